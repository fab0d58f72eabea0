"""``python -m mobile_gguf`` is the ``mobile-gguf`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
