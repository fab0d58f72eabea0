"""What a child process of the conversion does before its work: a clean stdout, and an end with its parent.

The parent (``children``) writes one line of JSON to stdin and keeps stdin open for as long as it lives; the
child answers with one JSON object per line on what was its stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, TextIO


class ChildChannel:
    """The two pipes of a child. ``job`` is what the parent asked for."""

    def __init__(self) -> None:
        # whatever the libraries print must not get between the answers
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.job: dict[str, Any] = json.loads(sys.stdin.readline())
        self._go = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, **event: Any) -> None:
        """Tell the parent something; ends this process if there is nobody to tell."""
        try:
            self._out.write(json.dumps(event) + "\n")
            self._out.flush()
        except BrokenPipeError:
            os._exit(1)

    def wait_for_go(self) -> None:
        """Wait until the parent says "go"; if it ends instead, so does this process."""
        self._go.wait()

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "go":
                self._go.set()
        os._exit(1)  # the parent has gone, by whatever signal
