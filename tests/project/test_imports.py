"""Importing the core is cheap: no torch, no Textual, nothing that is installed only later."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "textual", "transformers", "numpy", "gguf", "llama_cpp", "jinja2", "fastapi", "uvicorn")


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``code``."""
    names = "print(*{name.partition('.')[0] for name in sys.modules})"
    shown = f"import sys; sys.path[:] = {sys.path!r}\n{code}\n{names}"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import mobile_gguf",
        "from mobile_gguf.cli import make_parser; make_parser()",
        "from mobile_gguf.cli import main\\nassert main(['list']) == 0",
    ],
)
def test_no_heavy_module_is_imported(code):
    modules = imported_by(code.replace("\\n", "\n"))
    assert "mobile_gguf" in modules
    assert not modules & set(HEAVY)


def test_importing_works_without_the_engine_and_numpy():
    hidden = f"for name in {HEAVY!r}: sys.modules[name] = None\n"
    code = hidden + "import mobile_gguf\nfrom mobile_gguf.cli import make_parser\nmake_parser()"
    assert "mobile_gguf" in imported_by(code)


def test_all_names_are_there():
    import mobile_gguf

    assert all(hasattr(mobile_gguf, name) for name in mobile_gguf.__all__)
