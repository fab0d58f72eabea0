"""Every option takes what its declaration says and nothing else, and holds it parsed."""

from __future__ import annotations

import ast
import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from mobile_gguf import sizes
from mobile_gguf.errors import UsageError
from mobile_gguf.options import (
    GenerateOptions,
    LoadOptions,
    Opt,
    ServeOptions,
    declared,
    defaults,
    make_options,
)
from mobile_gguf.options.loading import MAX_THREADS
from mobile_gguf.sizes import AUTO, OFF, Size

KINDS = (LoadOptions, GenerateOptions, ServeOptions)
EVERY = [(options, name) for options in KINDS for name in declared(options)]
NAMES = [f"{options.__name__}.{name}" for options, name in EVERY]

# what no option of any type has: each is thrown at all of them
NO_VALUES: tuple[Any, ...] = (
    b"text", b"", bytearray(b"40%"), object(), Path("x"), {1, 2}, frozenset(), range(3), len, LoadOptions,
    1j, math.nan, -math.inf, math.inf, np.nan, np.array([1, 2]), np.array("exact"), [1, "x"], ["x", None],
    [[]], [b"x"], ("",), "\ud83d", [["\udcff"]], 10**400, -(10**5000), float("1e400"), NotImplemented, ...,
)  # fmt: skip


def kind(opt: Opt) -> str:
    if opt.choices:
        return "choice"
    if opt.is_flag:
        return "flag"
    return {int: "int", float: "float"}.get(opt.read, "parsed")  # type: ignore[arg-type]


def refused(options: type[Any], name: str, value: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make_options(options, {name: value})
    message = str(caught.value)
    assert name in message, message
    assert len(message) < 400, "however long the value is"
    return message


@pytest.mark.parametrize(("options", "name"), EVERY, ids=NAMES)
def test_no_option_has_such_a_value(options: type[Any], name: str) -> None:
    for value in NO_VALUES:
        refused(options, name, value)


@pytest.mark.parametrize(("options", "name"), EVERY, ids=NAMES)
def test_a_value_of_another_type_is_refused_by_name(options: type[Any], name: str) -> None:
    opt = declared(options)[name]
    of_any_type: dict[str, Any] = {
        "none": st.none(),
        "bool": st.booleans(),
        "int": st.integers(),
        "float": st.floats(),
        "text": st.text(),
        "bytes": st.binary(),
        "list": st.lists(st.integers() | st.none(), min_size=1),
        "dict": st.dictionaries(st.text(min_size=10), st.integers()),
        "fraction": st.fractions(),
    }
    takes = {
        "choice": set(),
        "flag": {"bool"},
        "int": {"int"},
        "float": {"int", "float", "fraction"},
        "parsed": {"text"},
    }[kind(opt)]
    if name in (
        *("ram_budget", "vram_budget", "memory", "prefix_cache", "session_cache"),
        *("max_request", "n_ubatch", "parallel"),
    ):
        takes = {"int", "text"}
    elif name == "flash_attn":
        takes = {"bool", "text"}
    elif name == "logit_bias":
        takes = {"dict"}
    elif name == "json_schema":
        takes = {"dict", "text"}
    if defaults(options)[name] is None:
        takes = takes | {"none"}
    wrong = st.one_of(*(strategy for known, strategy in of_any_type.items() if known not in takes))

    @settings(max_examples=40)
    @given(wrong)
    def check(value: Any) -> None:
        if kind(opt) == "choice" and value in opt.choices:
            return
        refused(options, name, value)

    check()


@pytest.mark.parametrize(("options", "name"), EVERY, ids=NAMES)
def test_numbers_end_where_the_declaration_says(options: type[Any], name: str) -> None:
    opt = declared(options)[name]
    if kind(opt) not in ("int", "float"):
        return

    @settings(max_examples=40)
    @given(st.integers() if opt.read is int else st.floats(allow_nan=False, allow_infinity=False))
    def check(value: int | float) -> None:
        low = -(2**63) if opt.low is None else opt.low
        high = 2**63 - 1 if opt.high is None and opt.read is int else opt.high
        if low <= value and (high is None or value <= high):
            held = getattr(make_options(options, {name: value}), name)
            assert held == value
            assert type(held) is opt.read
        else:
            refused(options, name, value)

    check()


@pytest.mark.parametrize(("options", "name"), EVERY, ids=NAMES)
def test_what_is_held_has_the_declared_type(options: type[Any], name: str) -> None:
    """The annotation says what a reader of the field gets; a default passes its own check unchanged."""
    opt, default = declared(options)[name], defaults(options)[name]
    annotation = get_args(get_type_hints(options, include_extras=True)[name])[0]
    if default is not None:
        assert opt.take(name, default) == default
    samples: dict[str, Any] = {
        "ram_budget": "40%", "vram_budget": OFF, "rpc": "host:1", "stop": ["a", "b"], "grammar": "root ::= x",
        "json_schema": {}, "logit_bias": {"5": 1}, "host": "::1", "allow_host": "a", "alias": ["a", "b"],
        "flash_attn": True, "api_key": "k", "api_key_file": "f", "cors": ["*"], "max_request": "1M",
        "speculate": "draft=small.gguf" if options.__name__ == "LoadOptions" else "draft",
    }  # fmt: skip
    number = 1.0 if opt.read is float else 1
    value = samples.get(name, opt.choices[0] if opt.choices else True if opt.is_flag else number)
    held = getattr(make_options(options, {name: value}), name)
    union = get_origin(annotation) in (Union, UnionType)
    wanted = get_args(annotation) if union else (annotation,)
    assert any(_is(held, one) for one in wanted), annotation


def _is(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is not None:
        return isinstance(value, get_origin(annotation))
    return isinstance(value, annotation) if isinstance(annotation, type) else value == annotation


def test_bool_is_no_int_and_a_float_no_whole_number() -> None:
    for name in ("n_ctx", "threads", "seed", "gamma"):
        assert "True" in refused(LoadOptions, name, True)
    assert "4096.0: it must be a whole number" in refused(LoadOptions, "n_ctx", 4096.0)
    assert "1 is neither True, False nor auto" in refused(LoadOptions, "flash_attn", 1)
    assert "1: it must be True or False" in refused(LoadOptions, "verbose", 1)


def test_what_passed_unseen() -> None:
    assert refused(GenerateOptions, "stop", 5).startswith("stop is 5: it must be text")
    assert refused(GenerateOptions, "grammar", 7) == "grammar is 7: it must be text"
    assert refused(GenerateOptions, "cache_prompt", "no") == "cache_prompt is 'no': it must be True or False"
    assert refused(LoadOptions, "rpc", 3) == "rpc is 3: it must be text"
    assert refused(LoadOptions, "threads", 10_000) == "threads is 10000: it must be at most 512"
    assert "at most 512" in refused(LoadOptions, "threads_batch", MAX_THREADS + 1)
    assert "2X" in refused(LoadOptions, "ram_budget", "2X")
    assert "1000: it must be between -100 and 100" in refused(GenerateOptions, "logit_bias", {5: 1000})
    assert "at most 16777216" in refused(LoadOptions, "n_ctx", 10**8)


def test_no_more_threads_than_llama_cpp_can_have() -> None:
    header = next((ROOT / "vendor").rglob("ggml.h"), None)
    if header is not None:
        assert f"#define GGML_MAX_N_THREADS      {MAX_THREADS}" in header.read_text()


def test_numpys_numbers_are_numbers() -> None:
    options = make_options(GenerateOptions, {"top_k": np.int64(3), "temperature": np.float32(0.5)})
    assert (options.top_k, options.temperature) == (3, 0.5)
    assert make_options(GenerateOptions, {"top_p": Fraction(1, 2)}).top_p == 0.5


def test_values_are_held_parsed() -> None:
    load = make_options(LoadOptions, {"ram_budget": "40%", "vram_budget": 1 << 20, "gamma": 1})
    assert (load.ram_budget, load.vram_budget) == (Size(fraction=0.4), Size(n_bytes=1 << 20))
    assert make_options(LoadOptions, {"vram_budget": " Off "}).vram_budget == OFF
    assert (LoadOptions().ram_budget, LoadOptions().vram_budget) == (AUTO, AUTO)
    assert make_options(LoadOptions, {"prefix_cache": "1M"}).prefix_cache == Size(n_bytes=1 << 20)
    assert make_options(LoadOptions, {"prefix_cache": "off"}).prefix_cache == OFF
    with pytest.raises(UsageError, match="40% is a share, and there is nothing that it is one of"):
        make_options(LoadOptions, {"prefix_cache": "40%"})
    answer = make_options(GenerateOptions, {"stop": "END", "logit_bias": [("7", 2), (8, -1.5)]})
    assert (answer.stop, answer.logit_bias) == (("END",), {7: 2.0, 8: -1.5})


def test_options_cannot_be_made_unchecked() -> None:
    with pytest.raises(UsageError, match="threads"):
        LoadOptions(threads=0)
    with pytest.raises(UsageError, match="gamma"):
        dataclasses.replace(LoadOptions(), gamma=math.nan)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of sizes that are parsed, by whomever."""
    texts: list[str] = []
    parse = sizes.parse_text

    def noting(text: str) -> Size:
        texts.append(text)
        return parse(text)

    monkeypatch.setattr(sizes, "parse_text", noting)
    return texts


def test_a_budget_is_parsed_once(parsed: list[str], command: Any, fake_load: Any, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    fake_load(FakeBackend())
    code, _, err = command("run", str(model), "hi", "-n", "2", "--ram-budget", "40%", "--vram-budget", "30%")
    assert code == 0, err
    assert parsed == ["40%", "30%"]


def test_nobody_parses_what_the_options_hold() -> None:
    """Sizes in options come parsed; who reads other texts of sizes is named here."""
    others = {
        *("cli/bench.py", "bench/plan.py", "bench/speculation_equal.py", "bench/gpu_kit/replay.py"),
        *("options/serving.py", "options/loading.py", "flags.py"),
    }
    readers = set()
    for folder in ("mobile_gguf", "convert", "tui", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source if "parse_size" in source else "")
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if names & {"parse_size", "parse_size_or_off"}:
                readers.add(path.relative_to(ROOT).as_posix().removeprefix("mobile_gguf/"))
    assert readers - {"sizes.py"} == others
