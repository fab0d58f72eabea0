"""Everything that calls C: the engine's API, ggml's devices, RPC servers, llama.cpp's log."""
