"""What a listening socket says of its address."""

from __future__ import annotations

import socket


def claim_address(made: socket.socket) -> None:
    """Before ``bind``: an address may be taken again at once, and never by two.

    ``SO_REUSEADDR`` says the first on Unix. On Windows it lets anybody have an address that is in use, and
    another option forbids that.
    """
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
