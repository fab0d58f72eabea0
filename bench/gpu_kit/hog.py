"""Keeps the link to the first GPU busy until it is killed: ``python -m mobile_gguf.bench.gpu_kit.hog``."""

from __future__ import annotations

from mobile_gguf.device.tier import find_devices
from mobile_gguf.plan.ggml import Ggml
from mobile_gguf.sizes import MIB

_COPY = 64 * MIB


def main() -> None:
    """Copy there and back, for ever."""
    ggml, device = Ggml(), find_devices("")[0]
    print("copying", flush=True)
    with ggml.backend(device) as backend:
        while True:
            ggml.time_copies(device, backend, _COPY, 1.0)


if __name__ == "__main__":
    main()
