"""What a model file says: its header, its experts, its geometry. No engine, no numpy."""
