"""Runs one conversion as a program, and ends itself where a test says so.

arguments: source, output, options as JSON, and maybe ACTION:PHASE. When a progress text begins with PHASE,
``int`` is Ctrl-C, ``kill`` is kill -9; before that the ids of this process's children are printed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from peak_memory import peak_resident_bytes

from mobile_gguf.convert.options import ConvertOptions
from mobile_gguf.convert.pipeline import convert_checkpoint
from mobile_gguf.errors import MobileError

_SIGNALS = {"int": signal.SIGINT, "kill": signal.SIGKILL}


def main() -> int:
    source, out, options = sys.argv[1:4]
    action, _, phase = (sys.argv[4] if len(sys.argv) > 4 else ":").partition(":")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it

    def progress(text: str, _done: float) -> None:
        if action and text.startswith(phase):
            children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
            print(children.read_text() if children.exists() else "", flush=True)
            os.kill(os.getpid(), _SIGNALS[action])

    try:
        result = convert_checkpoint(
            source, Path(out), ConvertOptions(**json.loads(options)), progress=progress
        )
    except MobileError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    of_children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps(result.as_json() | {"peak_bytes": max(peak_resident_bytes(), of_children)}))
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
