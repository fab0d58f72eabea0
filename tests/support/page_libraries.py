"""The page's libraries: fetches them from npm again, and says version and checksum of each file.

``python tests/support/page_libraries.py [--fetch]``. ``page/vendor/libraries.json`` has the packages, what
npm says of the whole of each (``integrity``), and the sha256 of each file that was taken out of it, byte for
byte. A package without ``integrity`` is a new version: it is fetched and written down.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "mobile_gguf" / "server" / "page" / "vendor"
LIST = FOLDER / "libraries.json"


def libraries() -> list[dict[str, Any]]:
    """What libraries.json says of each package."""
    return json.loads(LIST.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wrong(folder: Path, listed: list[dict[str, Any]]) -> list[str]:
    """What is not as it is listed: files that differ, are missing, or that no library has."""
    named = {name: digest for library in listed for name, digest in library.get("sha256", {}).items()}
    wanted = {name for library in listed for name in library["files"].values()}
    there = {path.name for path in folder.iterdir()} - {LIST.name}
    found = [f"{name}: no sha256 is listed" for name in sorted(wanted - named.keys())]
    found += [f"{name}: of no library" for name in sorted(there - wanted)]
    found += [f"{name}: missing" for name in sorted(wanted - there)]
    return found + [
        f"{name}: not what was fetched"
        for name in sorted(there & named.keys())
        if sha256(folder / name) != named[name]
    ]


def fetch(library: dict[str, Any]) -> None:
    """Take a package's files from npm; ends the program if the package is not what it was."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"{library['package']}@{library['version']}"
        packed = subprocess.run(
            ["npm", "pack", name, "--json", "--ignore-scripts"],
            cwd=folder,
            check=True,
            stdout=subprocess.PIPE,
        )
        said = json.loads(packed.stdout)
        (facts,) = said if isinstance(said, list) else said.values()
        if library.setdefault("integrity", facts["integrity"]) != facts["integrity"]:
            sys.exit(f"{name}: npm has {facts['integrity']} and not {library['integrity']}: not taken")
        with tarfile.open(Path(folder) / facts["filename"]) as archive:
            for inside, outside in library["files"].items():
                file = archive.extractfile(f"package/{inside}")
                if file is None:
                    sys.exit(f"{name} has no file {inside}")
                (FOLDER / outside).write_bytes(file.read())
    library["sha256"] = {outside: sha256(FOLDER / outside) for outside in library["files"].values()}


def main() -> None:
    """Fetches if asked, and prints a line for each file."""
    listed = libraries()
    if "--fetch" in sys.argv[1:]:
        for library in listed:
            fetch(library)
        LIST.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    for library in listed:
        for name, digest in library["sha256"].items():
            print(f"{library['package']} {library['version']}  {name}  {digest}")
    if found := wrong(FOLDER, listed):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
