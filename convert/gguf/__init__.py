"""GGUF files as bytes and lists: read, written, laid out anew, and which of their tensors are experts."""
