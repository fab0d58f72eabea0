"""Where models would go on this machine now: its memory and its devices, looked at once for many models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mobile_gguf.device.ask import ask_devices
from mobile_gguf.errors import EngineError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import OFF

from .cached import fit_of_run, predict_cached
from .fit import DeviceMemory, Fit
from .prediction import Prediction


class Here:
    """This machine. ``servers`` are RPC servers; devices are asked for with the first model that may use
    one."""

    def __init__(self, servers: str = "") -> None:
        self._servers = servers
        self.problem = ""  # why the devices are not known, once they have been asked for

    @cached_property
    def memory(self) -> Memory:
        return read_memory()

    @cached_property
    def devices(self) -> Sequence[DeviceMemory]:
        """None of them where they cannot be had; ``problem`` then says why."""
        try:
            return [DeviceMemory.of(device) for device in ask_devices(self._servers)]
        except EngineError as error:
            self.problem = str(error)
            return []

    def fit(self, info: GgufInfo, options: LoadOptions | None = None) -> Fit:
        """Where a run with ``options`` would put the model; raises FitError if it would be refused."""
        options = options or LoadOptions()
        devices = () if options.vram_budget == OFF else self.devices
        return fit_of_run(info, options, devices, self.memory)

    def speed(self, info: GgufInfo, fit: Fit, options: LoadOptions | None = None) -> Prediction | None:
        """The speed of that run by measurements made before, None without them; never raises."""
        return predict_cached(info, options, fit)
