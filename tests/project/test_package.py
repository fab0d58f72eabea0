"""The wheel and the source distribution: complete, and enough for a clean environment."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tiny_models
from places import ROOT

from mobile_gguf.bench.gpu_kit.pack import package_folders


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PIP_RETRIES": "10"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, made of the files that git knows, and the wheel made of the sdist."""
    work = tmp_path_factory.mktemp("dist")
    tree = work / "tree"
    for name in _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    _run(sys.executable, "-m", "build", "--sdist", "--wheel", "--outdir", work, tree, cwd=work)
    (sdist,) = work.glob("*.tar.gz")
    (wheel,) = work.glob("*.whl")
    return sdist, wheel


def _source_files(suffixes: set[str]) -> set[str]:
    found = set()
    for package, folder in package_folders(ROOT).items():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix in suffixes and "results" not in path.parts:
                found.add(f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}")
    return found


def test_wheel_has_every_module_and_patch(distributions: tuple[Path, Path]):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    wanted = _source_files(
        {".py", ".typed", ".patch", ".c", ".cpp", ".h", ".cmake", ".json", ".npz", ".txt", ".tcss", ".html"}
        | {".js", ".css", ".svg", ".LICENSE"}
    )
    assert wanted - names == set()
    assert "mobile_gguf/py.typed" in names


def test_sdist_can_be_built_from(distributions: tuple[Path, Path]):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "patches/series", "vendor/pin.json"} <= names


def test_clean_environment_runs_a_model(distributions: tuple[Path, Path], tmp_path: Path):
    python = tmp_path / "venv" / "bin" / "python"
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    command = python.with_name("mobile-gguf")
    _run(*pip, "--no-deps", distributions[1])
    _run(command, "engine", "build")
    _run(*pip, distributions[1])
    said = _run(
        command,
        "run",
        tiny_models.path("qwen3moe"),
        "--ram-budget",
        "100%",
        "-n",
        "4",
        "--json",
        "a",
        cwd=tmp_path,
    )
    assert '"receipt"' in said
    shown = _run(python, "-c", "import mobile_gguf; print(mobile_gguf.__file__)", cwd=tmp_path)
    assert str(tmp_path) in shown, "the checkout was imported, not the installed package"
