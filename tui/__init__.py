"""The Textual chat (imported as mobile_gguf.tui)."""
