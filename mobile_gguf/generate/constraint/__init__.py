"""Answers that follow a grammar or a JSON schema: read, bounded, compiled, asked for tokens that fit."""
