"""``python -m mobile_gguf`` is the ``mobile-gguf`` command."""

import os
import sys


def fill_closed_streams() -> None:
    """Make a standard stream that is closed lead nowhere.

    Else the next file that is opened gets its number, and what native code prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest number that is free is this one, because those below it are open by now
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def main() -> int:
    """Run the command line; Ctrl-C is quiet from its first import on, and so is another one at its end."""
    try:
        fill_closed_streams()
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    finally:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left but the interpreter's own end


if __name__ == "__main__":
    sys.exit(main())
