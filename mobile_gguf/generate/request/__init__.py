"""What a caller asks for, as far as a model allows it."""
