"""Is a GGUF what its checkpoint says? Logits, tokens and chat template against Transformers."""
