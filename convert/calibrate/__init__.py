"""Measure a model on text and write what was learnt into its file."""
