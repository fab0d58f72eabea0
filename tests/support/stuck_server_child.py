"""A server whose model never comes back from its first evaluation; prints what it prepared, and its address.

``python stuck_server_child.py GRACE``
"""

from __future__ import annotations

import sys
import time

from fake_backend import FakeBackend, fake_info

from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions
from mobile_gguf.server.run import bind, serve
from mobile_gguf.server.settings import ServerSettings


def main() -> None:
    backend = FakeBackend()
    backend.on_evaluate = lambda: time.sleep(10_000)
    model = Model(backend, fake_info(), LoadOptions())
    settings = ServerSettings(names=("fake",), grace=float(sys.argv[1]))
    serve(model, settings, bind("127.0.0.1", 0), announce=lambda url: print(*backend.log, url, flush=True))


if __name__ == "__main__":
    main()
