"""``make lint`` sees every file: an error planted in any package is found, as is an import that goes up."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import lint_tree
import pytest
from places import ROOT

from mobile_gguf.bench.gpu_kit.pack import package_folders

PACKAGES = package_folders(ROOT)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages and tests, as ``make lint`` checks them."""
    found = tmp_path_factory.mktemp("lint") / "tree"
    lint_tree.make_tree(found)
    return found


def test_lint_runs_what_is_tested_here() -> None:
    plan = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"python tests/support/lint_tree\.py build/\S+\n", plan.stdout), plan


def test_every_python_file_is_checked(tree: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = sorted((ROOT / name).read_bytes() for name in listed.stdout.splitlines() if (ROOT / name).exists())
    assert sorted(path.read_bytes() for path in tree.rglob("*.py")) == ours


@pytest.fixture(scope="module")
def type_errors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the type check says of a project with these packages, empty but for a planted error in each."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copy2(ROOT / "pyproject.toml", root)
    for package, folder in PACKAGES.items():
        planted = root / folder.relative_to(ROOT)
        planted.mkdir(parents=True, exist_ok=True)
        (planted / "__init__.py").touch()
        (planted / "planted.py").write_text(f'number: int = "{package}"\n', encoding="utf-8")
    for folder in lint_tree.BESIDE:
        (root / folder / "deep").mkdir(parents=True)
        (root / folder / "deep" / "planted.py").write_text(f'number: int = "{folder}"\n', encoding="utf-8")
    lint_tree.make_tree(root / "tree", root)
    done = lint_tree.check_types(root / "tree")
    assert done.returncode == 1, done.stdout
    return done.stdout


@pytest.mark.parametrize("where", [*PACKAGES, *lint_tree.BESIDE])
def test_a_wrong_type_is_found(where: str, type_errors: str) -> None:
    place = where.replace(".", "/") if where in PACKAGES else f"{where}/deep"
    assert re.search(rf"/{place}/planted\.py:1:15 - error: .*{where}'", type_errors)


def test_the_contracts_are_kept(tree: Path) -> None:
    done = lint_tree.check_imports(tree)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "imported", "said"),
    [
        ("files", "mobile_gguf.cli", "mobile_gguf.files is not allowed to import mobile_gguf.cli"),
        (
            "convert.gguf",
            "mobile_gguf.tui.app",
            "mobile_gguf.convert is not allowed to import mobile_gguf.tui",
        ),
        ("engine", "mobile_gguf.gguf.info", "mobile_gguf.engine is not allowed to import mobile_gguf.gguf"),
        ("vendor", "mobile_gguf.options", "mobile_gguf.vendor is not allowed to import mobile_gguf.options"),
        ("api", "torch", "mobile_gguf is not allowed to import torch"),
        ("server", "textual.app", "mobile_gguf is not allowed to import textual"),
        ("tui.store", "transformers", "mobile_gguf is not allowed to import transformers"),
        ("attic", "json", "attic"),  # a room that no floor names
        ("generate.attic", "json", "attic"),
        (
            "generate.passes",
            "mobile_gguf.generate.loss.auto",
            "mobile_gguf.generate.passes is not allowed to import mobile_gguf.generate.loss",
        ),
        (
            "generate.context",
            "mobile_gguf.generate.form.form",
            "mobile_gguf.generate.context is not allowed to import mobile_gguf.generate.form",
        ),
    ],
)
def test_an_import_that_goes_up_is_found(
    room: str, imported: str, said: str, tree: Path, tmp_path: Path
) -> None:
    """Within a function, where no import of the module would show it."""
    planted = tmp_path / "tree" / "mobile_gguf"
    shutil.copytree(tree / "mobile_gguf", planted)
    folder = planted.joinpath(*room.split("."))
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / "planted.py").write_text(f"def planted():\n    import {imported}\n", encoding="utf-8")
    done = lint_tree.check_imports(planted.parent)
    assert done.returncode == 1, done.stdout
    assert said in " ".join(done.stdout.split())
