"""``python -m mobile_gguf`` is the ``mobile-gguf`` command."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C ends it quietly from its first import on."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
