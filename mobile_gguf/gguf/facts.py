"""Typed access to what a GGUF's metadata says of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobile_gguf.errors import ModelFormatError


class Facts:
    """Typed access to ``ARCH.*`` metadata; a value of the wrong type is the file's fault."""

    def __init__(self, path: Path, architecture: str, metadata: dict[str, Any]) -> None:
        self.path = path
        self.architecture = architecture
        self.metadata = metadata

    def integer(self, name: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise self.wrong(name, value)
        return value

    def per_layer(self, name: str, n_layer: int, default: int = 0) -> tuple[int, ...]:
        """A value that stands once for all layers, or as an array with one for each."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list):
            if not all(isinstance(item, int) for item in value):
                raise self.wrong(name, value)
            return tuple(value)
        return (self.integer(name, default),) * n_layer

    def flags(self, name: str, n_layer: int) -> tuple[bool, ...] | None:
        """A yes or no for each layer, None if the file does not say; layers beyond the array are a no."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        if not isinstance(value, list):
            return None
        if not all(isinstance(item, int) for item in value):
            raise self.wrong(name, value)
        return tuple(i < len(value) and bool(value[i]) for i in range(n_layer))

    def wrong(self, name: str, value: object) -> ModelFormatError:
        key = f"{self.architecture}.{name}"
        return ModelFormatError(f"{self.path} cannot be used: metadata {key} is {value!r:.60}")
