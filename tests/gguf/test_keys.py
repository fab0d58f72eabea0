"""Names in a GGUF are said once: ours in gguf/keys.py, expert tensors in gguf/experts.py; the C++ agrees."""

import ast
import re

import pytest
from places import C_SOURCES, ROOT

from mobile_gguf.gguf import experts, keys
from mobile_gguf.gguf.experts import ExpertName, expert_name, is_beside_experts

PACKAGES = ("mobile_gguf", "convert", "tui", "bench", "vendor")
KEYS = {value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
OURS = re.compile(r"mobile\.(?!h$)[a-z_0-9.]+")
# names of expert tensors, and what looks for them
EXPERTS = re.compile(r"blk(\\)?\..*ffn_.*(_exps|\\d)|_exps\\\.")


def texts(source: str) -> list[tuple[int, str]]:
    """Every string of a module, parts of f-strings as well, but no docstring: (line, text)."""
    tree = ast.parse(source)
    docs = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs
    ]


def found_elsewhere(pattern: re.Pattern[str], owner: str, *words: str, whole: bool) -> list[str]:
    """Texts that match; only files that have one of ``words`` can, and to look at all takes seconds."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            source = path.read_text(encoding="utf-8")
            if name != owner and any(word in source for word in words):
                for line, text in texts(source):
                    if pattern.match(text) if whole else pattern.search(text):
                        found.append(f"{name}:{line}: {text!r}")
    return found


def test_our_keys_stand_in_one_file():
    assert found_elsewhere(OURS, "mobile_gguf/gguf/keys.py", "mobile.", whole=True) == []


def test_patterns_of_expert_tensors_stand_in_one_file():
    assert found_elsewhere(EXPERTS, "mobile_gguf/gguf/experts.py", "ffn_", "_exps", whole=False) == []


@pytest.mark.parametrize(
    ("pattern", "planted"),
    [
        (OURS, 'x = read("mobile.layout")'),
        (OURS, 'x = f"mobile.importance.{layer}"'),
        (EXPERTS, r'x = re.compile(r"blk\.\d+\.ffn_(up|down)_exps\.weight")'),
        (EXPERTS, r'x = re.compile(r"blk\.\d+\.ffn_(up|down)\.(\d+)\.weight")'),
        (EXPERTS, 'x = f"blk.{layer}.ffn_down_exps.weight"'),
    ],
)
def test_a_planted_name_is_found(pattern, planted):
    joined = "".join(text for _, text in texts(planted))
    assert pattern.search(joined), joined


def test_the_engine_reads_keys_of_the_same_names():
    cpp = {
        key
        for path in C_SOURCES.rglob("*.cpp")
        for key in re.findall(r'"(mobile\.(?!h")[a-z_.]*)"', path.read_text(encoding="utf-8"))
    }
    assert cpp == {keys.PREFIX, keys.VERSION, keys.LAYOUT, keys.SEGMENTS}


def test_the_engine_knows_the_same_format_and_matrices():
    (layout,) = C_SOURCES.rglob("mobile-layout.cpp")
    text = layout.read_text(encoding="utf-8")
    version = re.search(r"VERSION\s*=\s*(\d+);", text)
    names = re.search(r"MATRIX_NAME\[\] = \{(.*?)\};", text)
    assert version is not None
    assert names is not None
    assert int(version[1]) == experts.FORMAT_VERSION
    assert tuple(re.findall(r'"(\w+)"', names[1])) == experts.MATRICES


def test_every_key_is_in_the_description_of_the_format():
    pages = ("format", "format-calibration", "calibrate")
    described = "".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in pages)
    ours = {key for key in KEYS if key.startswith(keys.PREFIX)}
    assert [key for key in sorted(ours) if f"`{key}" not in described] == []


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("blk.3.ffn_gate_up_exps.weight", ExpertName(3, "gate_up")),
        ("blk.0.ffn_down.17.weight", ExpertName(0, "down", 17)),
        ("blk.0.ffn_down.017.weight", None),
        ("blk.00.ffn_down_exps.weight", None),
        ("blk.0.ffn_down.1234567.weight", None),
        ("blk.0.ffn_down_shexp.weight", None),
        ("blk.0.ffn_down.weight", None),
        ("blk.0.ffn_down_exps.bias", None),
    ],
)
def test_names_are_read_and_written(tensor, name):
    assert expert_name(tensor) == name
    assert name is None or str(name) == tensor


def test_biases_and_scales_stand_beside():
    names = [
        "blk.0.ffn_up_exps.bias",
        "blk.0.ffn_up_exps.scale",
        "blk.0.ffn_up_exps.weight",
        "blk.0.ffn_up.bias",
    ]
    assert [is_beside_experts(name) for name in names] == [True, True, False, False]
