"""Tokens that are guessed and then checked, several in a pass: where guesses come from, and how many pay."""
