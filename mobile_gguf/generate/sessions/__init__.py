"""Texts that have left the context: kept in memory and on disk until they go on."""
