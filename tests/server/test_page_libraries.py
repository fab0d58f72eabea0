"""The page's libraries are what their makers published."""

import json
import shutil
from pathlib import Path

import page_libraries

ROOT = Path(__file__).parents[2]


def test_libraries_are_as_they_were_fetched_and_named_with_their_licences():
    listed = page_libraries.libraries()
    assert page_libraries.wrong(page_libraries.FOLDER, listed) == []
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for library in listed:
        assert f"{library['package']} {library['version']}" in notice
        assert library["integrity"].startswith("sha512-")
        (licence,) = [name for name in library["files"].values() if name.endswith(".LICENSE")]
        assert "copyright" in (page_libraries.FOLDER / licence).read_text(encoding="utf-8").lower()


def test_a_library_that_was_changed_is_found(tmp_path):
    folder = tmp_path / "vendor"
    shutil.copytree(page_libraries.FOLDER, folder)
    listed = json.loads((folder / page_libraries.LIST.name).read_text())
    with open(folder / "temml.js", "a") as file:
        file.write(" ")
    (folder / "mdurl.LICENSE").unlink()
    (folder / "more.js").write_text("")
    del listed[0]["sha256"]["markdown-it.js"]
    assert page_libraries.wrong(folder, listed) == [
        "markdown-it.js: no sha256 is listed",
        "more.js: of no library",
        "mdurl.LICENSE: missing",
        "temml.js: not what was fetched",
    ]
