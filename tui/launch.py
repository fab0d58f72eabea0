"""Starting the TUI on this terminal, and leaving it clean."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from mobile_gguf.config import Default
from mobile_gguf.errors import EngineError
from mobile_gguf.files.paths import cache_dir, config_dir, data_dir
from mobile_gguf.files.running import CHAT, announced
from mobile_gguf.remote.connection import Server

from .errors import require_textual


@dataclass(frozen=True)
class Launch:
    """What the command line asked for: a model or none, options by name, a system message.

    ``configured`` is what the environment and the configuration file say, ``goes_on``: with the conversation
    that was saved last (``last``), or with that of a title or number; empty: with none.
    ``server``: the models are those of a server.
    """

    reference: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    configured: dict[str, Default] = field(default_factory=dict)
    goes_on: str = ""
    server: Server | None = None


def run_tui(launch: Launch) -> int:
    """Run the TUI until the user leaves; returns the exit code.

    Raises TuiMissingError without the extra ``tui``, EngineError if the engine never came back.
    """
    require_textual()
    from .app import ChatApp
    from .store.settings import Settings
    from .terminal import own_terminal

    log = cache_dir() / "logs" / "tui.log"
    with own_terminal(log):
        app = ChatApp(
            launch.reference,
            settings=Settings(config_dir() / "chat.json", launch.options, launch.configured),
            store_path=data_dir() / "conversations.db",
            system=launch.system,
            goes_on=launch.goes_on,
            server=launch.server,
        )
        since = {"since": time.time()}
        with announced(CHAT, lambda: since | app.engine.facts()):
            code = app.run()
            came_back = app.close()
    if not came_back:
        # A thread that is inside the library cannot be ended; the process can.
        error = EngineError("the engine did not answer and was left behind")
        print(f"mobile-gguf: error: {error}", file=sys.stderr, flush=True)
        os._exit(EngineError.exit_code)
    return code or app.return_code or 0
