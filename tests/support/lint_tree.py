"""Types and imports of the package as it is installed, in a real tree: what ``make lint`` runs.

Neither pyright nor import-linter knows setuptools' ``package-dir``, and pyright follows no links. Which
folder is which package is read from pyproject.toml. ``python lint_tree.py TREE`` writes and checks the tree.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from places import ROOT

from mobile_gguf.bench.gpu_kit.pack import package_folders

BESIDE = ("tests", "docs")  # what else has Python files
MARKER = "py.typed"


def make_tree(tree: Path, root: Path = ROOT) -> None:
    """Write the packages, the tests and pyright's settings into ``tree``, which is emptied first."""
    shutil.rmtree(tree, ignore_errors=True)
    for package, folder in package_folders(root).items():
        target = tree.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*.py"), *folder.glob(MARKER)]:
            shutil.copy2(path, target)
    for folder in BESIDE:
        for path in root.joinpath(folder).rglob("*.py"):
            target = tree / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    settings = {
        "include": ["mobile_gguf", *BESIDE], "extraPaths": ["tests/support"], "typeCheckingMode": "standard",
    }  # fmt: skip
    (tree / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")


def check_types(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pyright on ``tree``."""
    python = ["--pythonpath", sys.executable]
    return _run([sys.executable, "-m", "pyright", *python, *options, "-p", str(tree)], tree)


def check_imports(tree: Path, project: Path = ROOT / "pyproject.toml") -> subprocess.CompletedProcess[str]:
    """Run the import contracts of ``project`` on ``tree``."""
    program = str(Path(sys.executable).with_name("lint-imports"))
    return _run([program, "--no-cache", "--no-logo", str(project)], tree)


def _run(command: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main(tree: Path) -> int:
    """Write the tree and say what is wrong with it."""
    make_tree(tree)
    code = 0
    for done in (check_imports(tree), check_types(tree)):
        print(done.stdout, end="", flush=True)
        code = code or done.returncode
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
