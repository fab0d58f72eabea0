"""What touches our own files: where they lie, and writing them whole or not at all."""
