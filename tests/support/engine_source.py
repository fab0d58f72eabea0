"""A source distribution of four files, and what else the tests of the engine build share."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

from mobile_gguf.vendor.pin import Pin

FILES = {
    "llama_cpp/__init__.py": '__version__ = "1.2.3"\n',
    "CMakeLists.txt": "project(tiny)\n",
    "vendor/llama.cpp/src/graph.cpp": "".join(f"line {number}\n" for number in range(1, 21)),
    "vendor/llama.cpp/docs/long.md": "not needed by a build\n",
    ".git/config": "[core]\n",
    "vendor/llama.cpp/.git": "gitdir: elsewhere\n",
}

VERSION_PATCH = """\
Subject: version

What: another version.
Why: to tell it apart.
Upstream: tiny 1.2.3.
Drop when: never.

diff --git a/llama_cpp/__init__.py b/llama_cpp/__init__.py
--- a/llama_cpp/__init__.py
+++ b/llama_cpp/__init__.py
@@ -1 +1 @@
-__version__ = "1.2.3"
+__version__ = "1.2.3+mobile.1"
"""

HOOK_PATCH = """\
Subject: a hook

What: calls us.
Why: so that
  we are called.
Upstream: tiny 1.2.3, line 10.
Drop when: never.

diff --git a/vendor/llama.cpp/src/graph.cpp b/vendor/llama.cpp/src/graph.cpp
--- a/vendor/llama.cpp/src/graph.cpp
+++ b/vendor/llama.cpp/src/graph.cpp
@@ -8,5 +8,6 @@
 line 8
 line 9
 line 10
+mobile_hook();
 line 11
 line 12
"""


def write_sdist(directory: Path) -> Pin:
    """Write the tiny source distribution into the cache below ``directory`` and return its pin."""
    path = directory / "sdist" / "tiny-1.2.3.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"tiny-1.2.3/{name}")
            member.size = len(text)
            member.mtime = 1_600_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pin("tiny", "1.2.3", "mobile.1", path.name, path.stat().st_size, digest, "0123abcde")


def write_patches(directory: Path, **patches: str) -> Path:
    """Write a patch set: the given patches (``_0001_name=text``), in order, and one source."""
    named = patches or {"_0001_version": VERSION_PATCH, "_0002_hook": HOOK_PATCH}
    files = {f"{name[1:].replace('_', '-')}.patch": text for name, text in named.items()}
    (directory / "src").mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "series").write_text("# in order\n" + "\n".join(files) + "\n", encoding="utf-8")
    (directory / "src" / "mobile.h").write_text("#define MOBILE_ABI_VERSION 7\n", encoding="utf-8")
    return directory


def write_tool(directory: Path, name: str, says: str = "") -> Path:
    """A program that prints one line."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def tree_content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of each file of a tree, by its path in it."""
    found: dict[str, tuple[bytes, int]] = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent) / name
            found[path.relative_to(directory).as_posix()] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found
