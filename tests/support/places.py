"""Where the repository's own files lie, for tests and their children."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
SHIM = TESTS / "shim"
SUPPORT = TESTS / "support"
C_SOURCES = ROOT / "patches" / "src"
