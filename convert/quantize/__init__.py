"""libllama's own quantiser in a process of its own, and what it is told."""
