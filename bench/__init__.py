"""The benchmark harness (imported as mobile_gguf.bench) and its recorded results."""
