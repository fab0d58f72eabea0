"""The patch set is complete, documented, hooks only, and applies exactly to the pinned source."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from engine_source import HOOK_PATCH, VERSION_PATCH, tree_content, write_patches, write_sdist

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.vendor import failures, patchset, source, worktree
from mobile_gguf.vendor.pin import load_pin

PATCHES = patchset.patches_dir()
SERIES = patchset.read_series(PATCHES)
EACH_PATCH = pytest.mark.parametrize("patch", SERIES, ids=[patch.name for patch in SERIES])

# hooks are a few added lines each; code belongs into patches/src
MOST_ADDED_LINES = 40
# ... and few in all: 129 lines, 83 of them outside the RPC backend, when this was written
MOST_ADDED_IN_ALL = 133
MOST_ADDED_BUT_RPC = 83


@pytest.fixture(scope="session")
def pinned_source() -> Path:
    """The stock source of the pin, fetched if this machine has never built the engine."""
    try:
        return source.unpacked_source(load_pin())
    except EngineBuildError as error:
        if failures.NO_INDEX in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def stock_tree(pinned_source: Path, tmp_path: Path) -> Path:
    source.copy_source(pinned_source, tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for the tiny source distribution."""
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        cwd=tree,
        check=True,
        capture_output=True,
    )


# --- the patch set of this repository


def test_series_lists_every_patch_once() -> None:
    names = [patch.name for patch in SERIES]
    assert names == sorted(set(names))
    assert set(names) == {path.name for path in PATCHES.glob("*.patch")}


def test_nothing_else_is_among_the_patches() -> None:
    allowed = {
        patchset.SERIES,
        patchset.SOURCES,
        "__init__.py",
        "__pycache__",
        *(patch.name for patch in SERIES),
    }
    assert {path.name for path in PATCHES.iterdir()} <= allowed
    found = {path for path in (PATCHES / patchset.SOURCES).rglob("*") if path.is_file()}
    assert found == set(patchset.read_sources(PATCHES).values())


@EACH_PATCH
def test_header_says_what_why_where_and_until_when(patch: patchset.Patch) -> None:
    assert patch.header.startswith("Subject: ")
    assert [name for name in patch.fields if name != patchset.STOCK_FIELD] == list(patchset.HEADER_FIELDS)
    assert all(len(text) > 10 for text in patch.fields.values())


@EACH_PATCH
def test_patch_holds_hooks_only(patch: patchset.Patch) -> None:
    text = patch.path.read_text(encoding="utf-8")
    assert not re.search(r"^(new file|deleted file|rename|copy|old mode|GIT binary)", text, re.MULTILINE)
    removed = re.findall(r"^-(?!-- )", text, re.MULTILINE)
    assert added_lines(text) <= MOST_ADDED_LINES
    assert len(removed) <= added_lines(text)


def added_lines(text: str) -> int:
    return len(re.findall(r"^\+(?!\+\+ )", text, re.MULTILINE))


def too_many_lines(texts: list[str]) -> list[str]:
    """What the hooks of a series exceed in all."""
    every = sum(map(added_lines, texts))
    others = sum(added_lines(text) for text in texts if "/ggml-rpc/" not in text)
    found = []
    if every > MOST_ADDED_IN_ALL:
        found.append(f"{every} added lines, at most {MOST_ADDED_IN_ALL}")
    if others > MOST_ADDED_BUT_RPC:
        found.append(f"{others} added lines outside the RPC backend, at most {MOST_ADDED_BUT_RPC}")
    return found


def test_hooks_are_few_lines_in_all() -> None:
    texts = [patch.path.read_text(encoding="utf-8", errors="surrogateescape") for patch in SERIES]
    assert too_many_lines(texts) == []
    room = MOST_ADDED_BUT_RPC - sum(added_lines(text) for text in texts if "/ggml-rpc/" not in text)
    assert too_many_lines([*texts, "+ hook\n" * (room + 1)]) != []  # planted: one line too many
    assert too_many_lines([*texts, "+++ b/ggml/src/ggml-rpc/x.cpp\n" + "+ hook\n" * 30]) != []


@EACH_PATCH
def test_public_headers_and_bindings_stay_upstreams(patch: patchset.Patch) -> None:
    touched = re.findall(r"^\+\+\+ b/(\S+)", patch.path.read_text(encoding="utf-8"), re.MULTILINE)
    assert touched
    for path in touched:
        assert not path.startswith(("vendor/llama.cpp/include/", "vendor/llama.cpp/ggml/include/"))
        assert not path.startswith("llama_cpp/") or path == "llama_cpp/__init__.py"


def test_version_of_the_wheel_is_the_pins() -> None:
    added = re.findall(r'^\+__version__ = "(.*)"', (SERIES[0].path).read_text(encoding="utf-8"), re.MULTILINE)
    assert added == [load_pin().engine_version]


def test_series_applies_exactly(stock_tree: Path) -> None:
    for patch in SERIES:
        applied, said = source.apply_patch(stock_tree, patch)
        assert applied, source.does_not_apply(patch, said)
        # an offset means that the patch was made for other lines: export it again
        assert "offset" not in said, said


def test_applying_twice_changes_nothing(pinned_source: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        source.copy_source(pinned_source, tmp_path / name)
        source.patch_tree(tmp_path / name, PATCHES)
    tree = tmp_path / "tree"
    assert len(source.sync_tree(tmp_path / "first", tree)) > 1000
    before = tree_content(tree)
    assert source.sync_tree(tmp_path / "second", tree) == []
    assert tree_content(tree) == before


def test_only_our_files_are_added(pinned_source: Path, stock_tree: Path) -> None:
    stock = set(tree_content(stock_tree))
    source.patch_tree(stock_tree, PATCHES)
    ours = source.SOURCES_IN_TREE.as_posix()
    expected = {f"{ours}/{name}" for name in patchset.read_sources(PATCHES)}
    assert set(tree_content(stock_tree)) - stock == expected
    assert not (pinned_source / ours).exists()


def test_patches_are_as_exported(pinned_source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "patches"
    shutil.copytree(PATCHES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    worktree.make_tree(tmp_path / "tree", load_pin(), copy, narrate=lambda text: None)
    worktree.export_patches(tmp_path / "tree", copy)
    for name in [patchset.SERIES, *(patch.name for patch in SERIES)]:
        # if this fails: `python -m mobile_gguf.vendor tree DIR`, then `export DIR`
        assert (copy / name).read_bytes() == (PATCHES / name).read_bytes(), name


# --- the tools, on a tiny source distribution


def test_patch_that_does_not_apply_says_how_to_export_again(tiny: Path) -> None:
    pin = write_sdist(tiny / "cache")
    patches = write_patches(tiny / "patches", _0001_hook=HOOK_PATCH.replace(" line 10\n", " line ten\n"))
    shutil.copytree(source.unpacked_source(pin), tiny / "tree")
    with pytest.raises(EngineBuildError) as caught:
        source.patch_tree(tiny / "tree", patches)
    message = str(caught.value)
    assert "\n" not in message
    assert "0001-hook.patch does not apply" in message
    assert "patch failed: vendor/llama.cpp/src/graph.cpp:8" in message
    for command in ("mobile_gguf.vendor tree DIR`", "tree DIR --continue`", "mobile_gguf.vendor export DIR`"):
        assert command in message


def test_missing_patch_is_named(tmp_path: Path) -> None:
    patches = write_patches(tmp_path / "patches")
    (patches / "0002-hook.patch").unlink()
    with pytest.raises(EngineBuildError, match=r"0002-hook\.patch is missing"):
        patchset.read_series(patches)


def test_header_fields_span_lines(tmp_path: Path) -> None:
    patch = patchset.read_series(write_patches(tmp_path / "patches"))[1]
    assert patch.subject == "a hook"
    assert patch.fields["Why"] == "so that we are called."


def test_fixes_apply_without_the_hooks(stock_tree: Path) -> None:
    """The stock library gets those patches without which upstream does not compile or run, and no other."""
    fixes = [patch for patch in SERIES if patch.is_fix]
    assert not any("mobile" in patch.name or b"mobile_" in patch.path.read_bytes() for patch in fixes)
    source.apply_patches(stock_tree, fixes)


def test_patching_inside_another_repository(tiny: Path) -> None:
    # git apply, run below the top of a repository, skips the files of a patch that lie elsewhere
    subprocess.run(["git", "init", "--quiet", str(tiny)], check=True)
    pin = write_sdist(tiny / "cache")
    tree = tiny / "below" / "tree"
    source.copy_source(source.unpacked_source(pin), tree)
    source.patch_tree(tree, write_patches(tiny / "patches"))
    assert "mobile_hook" in (tree / "vendor/llama.cpp/src/graph.cpp").read_text(encoding="utf-8")
    assert (tree / source.SOURCES_IN_TREE / "mobile.h").is_file()


def test_sync_touches_what_changed_and_nothing_else(tiny: Path) -> None:
    stock = source.unpacked_source(write_sdist(tiny / "cache"))
    patched, tree = write_patches(tiny / "patches"), tiny / "tree"
    source.copy_source(stock, tree)
    before = tree_content(tree)
    source.copy_source(stock, tiny / "fresh")
    source.patch_tree(tiny / "fresh", patched)
    changed = {path.as_posix() for path in source.sync_tree(tiny / "fresh", tree)}
    hooked = {"llama_cpp/__init__.py", "vendor/llama.cpp/src/graph.cpp"}
    assert changed == {*hooked, "vendor/llama.cpp/mobile/mobile.h"}
    # back to stock: the old content must look new to a build, whatever time the archive gave it
    source.copy_source(stock, tiny / "again")
    source.sync_tree(tiny / "again", tree)
    after = tree_content(tree)
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert {name for name in after if after[name][1] != before[name][1]} == hooked


def test_tree_and_export_round_trip(tiny: Path) -> None:
    pin, patches, tree = write_sdist(tiny / "cache"), write_patches(tiny / "patches"), tiny / "tree"
    state = worktree.make_tree(tree, pin, patches, narrate=lambda text: None)
    assert state == worktree.TreeState(["0001-version.patch", "0002-hook.patch"])
    graph = tree / "vendor/llama.cpp/src/graph.cpp"
    graph.write_text(graph.read_text(encoding="utf-8").replace("line 15\n", "line 15\nmobile_other();\n"))
    with pytest.raises(EngineBuildError, match="changes in no commit"):
        worktree.export_patches(tree, patches)
    git(tree, "commit", "--all", "--message", "Another hook\n\nWhat: more.")
    names = worktree.export_patches(tree, patches)
    assert names == ["0001-version.patch", "0002-hook.patch", "0003-another-hook.patch"]
    series = patchset.read_series(patches)
    assert [patch.name for patch in series] == names
    assert series[0].header == VERSION_PATCH.partition("diff --git")[0]
    assert series[2].fields == {"What": "more."}
    source.copy_source(source.unpacked_source(pin), tiny / "again")
    source.patch_tree(tiny / "again", patches)
    assert (tiny / "again/vendor/llama.cpp/src/graph.cpp").read_bytes() == graph.read_bytes()


def test_export_drops_the_patch_of_a_dropped_commit(tiny: Path) -> None:
    pin, patches, tree = write_sdist(tiny / "cache"), write_patches(tiny / "patches"), tiny / "tree"
    worktree.make_tree(tree, pin, patches, narrate=lambda text: None)
    git(tree, "reset", "--hard", "HEAD^")
    assert worktree.export_patches(tree, patches) == ["0001-version.patch"]
    assert not (patches / "0002-hook.patch").exists()
    assert (patches / "series").read_text(encoding="utf-8") == "# in order\n0001-version.patch\n"


def test_moved_pin_is_followed_by_hand(tiny: Path) -> None:
    pin, tree = write_sdist(tiny / "cache"), tiny / "tree"
    moved = VERSION_PATCH.replace('-__version__ = "1.2.3"\n', '-__version__ = "1.2.2"\n')
    patches = write_patches(tiny / "patches", _0001_version=moved, _0002_hook=HOOK_PATCH)
    state = worktree.make_tree(tree, pin, patches, narrate=lambda text: None)
    assert state == worktree.TreeState([], "0001-version.patch", ("llama_cpp/__init__.py.rej",))
    with pytest.raises(EngineBuildError, match="waiting to be placed"):
        worktree.export_patches(tree, patches)
    with pytest.raises(EngineBuildError, match=r"__init__\.py\.rej"):
        worktree.continue_tree(tree, patches)
    (tree / "llama_cpp/__init__.py.rej").unlink()
    (tree / "llama_cpp/__init__.py").write_text('__version__ = "1.2.3+mobile.1"\n', encoding="utf-8")
    assert worktree.continue_tree(tree, patches) == worktree.TreeState(["0002-hook.patch"])
    assert worktree.export_patches(tree, patches) == ["0001-version.patch", "0002-hook.patch"]
    source.copy_source(source.unpacked_source(pin), tiny / "again")
    source.patch_tree(tiny / "again", patches)
    assert "+mobile.1" in (tiny / "again/llama_cpp/__init__.py").read_text(encoding="utf-8")


def test_tree_refuses_a_directory_that_is_in_use(tiny: Path) -> None:
    (tiny / "tree").mkdir()
    (tiny / "tree" / "file").touch()
    with pytest.raises(EngineBuildError, match="is not empty"):
        worktree.make_tree(tiny / "tree", write_sdist(tiny / "cache"), write_patches(tiny / "patches"))
    with pytest.raises(EngineBuildError, match="is not a tree of patches"):
        worktree.export_patches(tiny / "tree", tiny / "patches")
