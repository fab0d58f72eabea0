"""This machine's devices as a run would find them, asked for where nothing may go wrong: in a list of models.

ggml ends the process where a driver fails (a GPU without free memory is enough), and a driver may hang. So
another process asks, and only if the installed engine can have a device at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.wording import why

MANIFEST = "_mobile_engine.json"  # in the installed llama_cpp package, as vendor/build.py writes it
TIMEOUT_S = 30.0  # the first call to a driver that nobody uses takes seconds
LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
_HOST_BACKENDS = {"cpu", "rpc"}


def may_have_devices() -> bool:
    """Whether the engine was built for devices of this machine; loads nothing.

    True where only its library could tell. A stock llama.cpp has no device tier.
    """
    if os.environ.get(LIBRARY_VARIABLE):
        return True
    # find_spec of a top-level package imports nothing
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return False
    try:
        manifest = json.loads((Path(spec.origin).parent / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    try:
        flags = manifest["options"]["cmake_args"]
        return bool(set(manifest["backends"]) - _HOST_BACKENDS) or any("-DGGML_" in flag for flag in flags)
    except (TypeError, KeyError):
        return True


def ask_devices(servers: str = "") -> list[Device]:
    """This machine's GPUs and the named RPC servers; their handles mean nothing in this process.

    Raises EngineError, with what the other process said, if they cannot be had. Takes as long as starting
    Python and loading the engine, and nothing where there can be no device.
    """
    if not servers and not may_have_devices():
        return []
    command = [sys.executable, "-m", __name__, servers]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # not what lies in the working directory
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EngineError(f"the driver of a device does not answer within {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise EngineError(f"the devices cannot be asked for: {why(error)}") from None
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"exit code {ended.returncode}"
        raise EngineError(said[-1] if said else f"asking for the devices ended with {how}")
    try:
        return [Device(**one) for one in json.loads(ended.stdout.splitlines()[-1])]
    except (ValueError, TypeError, IndexError):
        raise EngineError("asking for the devices brought no answer") from None


def _main(servers: str) -> int:
    from mobile_gguf.engine.binding import find_engine
    from mobile_gguf.engine.log import capture_log

    from .tier import find_devices

    try:
        if find_engine() is None:
            found = []
        else:
            capture_log()
            found = find_devices(servers)
    except MobileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps([{**asdict(device), "handle": 0} for device in found]))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
