"""Convert Hugging Face MoE checkpoints to GGUF (imported as mobile_gguf.convert)."""
