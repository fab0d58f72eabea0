"""Our C++ (patches/src) keeps its floors, guards its exports, and asserts nothing that has an error path.

Each rule is a function from source texts to complaints, and is seen to find a planted fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from mobile_gguf.vendor import patchset

SOURCES = {
    name: path.read_text(encoding="utf-8")
    for name, path in patchset.read_sources(patchset.patches_dir()).items()
}

# each may include those before it; "": mobile.h and what goes with it
FLOORS = ("ggml", "", "chat", "store", "device", "route", "api")

HEADERS_OF_EXPORTS = ("mobile.h", "mobile-chat.h", "device/mobile-rpc.h")
# nothing in them can throw, or they call a guarded one and nothing else
UNGUARDED = {
    "mobile_abi_version",
    "mobile_last_error",
    "mobile_load_default_params",
    "mobile_loss_default_params",
    "mobile_device_default_params",
    "mobile_rpc_clear_loss",
    "mobile_chat_template_free",
    "mobile_chat_parser_free",
    "mobile_chat_text_free",
}


def _includes(name: str, sources: Mapping[str, str]) -> Iterator[str]:
    """Our files that a file includes, from the root of the sources or beside it."""
    beside = name.rpartition("/")[0]
    for included in re.findall(r'^#include "([^"]+)"', sources[name], re.MULTILINE):
        for found in (included, f"{beside}/{included}"):
            if found in sources:
                yield found
                break


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def upward_includes(sources: Mapping[str, str]) -> list[str]:
    """Includes of a folder by one that lies below it."""
    return [
        f"{name} includes {included}"
        for name in sources
        for included in _includes(name, sources)
        if FLOORS.index(_folder(included)) > FLOORS.index(_folder(name))
    ]


def include_circles(sources: Mapping[str, str]) -> list[str]:
    """Files, each a header with the source of its name, that include each other in a circle."""
    units: dict[str, set[str]] = {}
    for name in sources:
        unit = name.rpartition(".")[0]
        others = {included.rpartition(".")[0] for included in _includes(name, sources)}
        units.setdefault(unit, set()).update(others - {unit})
    found: list[str] = []
    done: set[str] = set()

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        if unit in trail:
            found.append(" > ".join((*trail[trail.index(unit) :], unit)))
        elif unit not in done:
            for other in sorted(units.get(unit, ())):
                visit(other, (*trail, unit))
            done.add(unit)

    for unit in sorted(units):
        visit(unit, ())
    return found


def exported(sources: Mapping[str, str]) -> list[str]:
    """The functions of the C API."""
    headers = "".join(sources[name] for name in HEADERS_OF_EXPORTS if name in sources)
    return re.findall(r"^LLAMA_API\b.*?\b(mobile_\w+)\s*\(", headers, re.MULTILINE)


def unguarded_exports(sources: Mapping[str, str]) -> list[str]:
    """Exports that are not defined as ``return mobile_guard...``, and can throw across the C API."""
    code = "".join(text for name, text in sources.items() if name.endswith(".cpp"))
    found = []
    for function in exported(sources):
        body = re.search(
            rf"^[\w ]+[*&]?\s*{function}\([^;{{]*\) \{{\n(.*?)^\}}", code, re.MULTILINE | re.DOTALL
        )
        if body is None:
            found.append(f"{function} is not defined")
        elif function not in UNGUARDED:
            statements = [line for line in body[1].splitlines() if not line.strip().startswith("//")]
            first, last = statements[0], statements[-1]
            one = first.endswith(");") and len(statements) == 1
            if not first.startswith("    return mobile_guard") or not (one or last == "    });"):
                found.append(f"{function} does more than return mobile_guard(...)")
    return found


def forbidden_calls(sources: Mapping[str, str]) -> list[str]:
    """Aborts; and assertions in C++, where there is an error path. In ggml's C they may only compare."""
    found = []
    for name, text in sources.items():
        code = re.sub(r"//.*", "", text)
        found += [f"{name}: {call}" for call in re.findall(r"\b(GGML_ABORT|abort|exit|printf)\s*\(", code)]
        for asserted in re.findall(r"\b(?:GGML_ASSERT|assert)\s*\((.*)\);", code):
            if not name.startswith("ggml/") or re.search(r"\w\s*\(|[^=!<>]=[^=]|\+\+|--", asserted):
                found.append(f"{name}: asserts {asserted}")
    return found


NUMBERS = "mobile_(?:model_layer|store_layer|slots_layer|part|store_part)"
# where a number of one space becomes one of another (mobile-ids.h)
CONVERSIONS = {"mobile-ids.h", "store/mobile-store.h"}


def raw_conversions(sources: Mapping[str, str]) -> list[str]:
    """Numbers made of another number's plain integer outside the named conversions; lists indexed by one."""
    made = re.compile(rf"\b{NUMBERS}\b\s*\w*\s*[({{][^;\n]*?\.n\b")
    found = []
    for name, text in sources.items():
        code = re.sub(r"//.*", "", text)
        found += [f"{name}: [{index}]" for index in re.findall(r"\[([^\[\]]*\.n)\]", code)]
        if name not in CONVERSIONS:
            found += [f"{name}: {match[0]}" for match in made.finditer(code)]
    return found


@pytest.mark.parametrize(
    "rule", [upward_includes, include_circles, unguarded_exports, forbidden_calls, raw_conversions]
)
def test_sources_keep_the_rule(rule) -> None:
    assert rule(SOURCES) == []


def test_every_file_lies_on_a_floor() -> None:
    assert {_folder(name) for name in SOURCES} == set(FLOORS)
    assert set(UNGUARDED) <= set(exported(SOURCES))
    assert len(exported(SOURCES)) > 30


def with_line(name: str, line: str) -> dict[str, str]:
    return {**SOURCES, name: f"{SOURCES[name]}{line}\n"}


def test_planted_faults_are_found() -> None:
    assert upward_includes(with_line("store/mobile-store.h", '#include "route/mobile-trace.h"')) == [
        "store/mobile-store.h includes route/mobile-trace.h"
    ]
    # what there was: load included layout for where experts lie, and layout load for whether there is a store
    circle = include_circles(with_line("store/mobile-layout.cpp", '#include "store/mobile-load.h"'))
    assert circle == ["store/mobile-load > store/mobile-layout > store/mobile-load"]
    for line in ("    GGML_ASSERT(take_slot(slot));", '    GGML_ABORT("no");', "    assert(n > 0);"):
        assert len(forbidden_calls(with_line("store/mobile-store.cpp", line))) == 1, line
    assert len(forbidden_calls(with_line("ggml/ggml-expert.c", "    GGML_ASSERT(next() > 0);"))) == 1
    assert forbidden_calls(with_line("ggml/ggml-expert.c", "    GGML_ASSERT(n <= 3);")) == []


@pytest.mark.parametrize(
    "line",
    [
        "    mobile_store_layer next(layer.n + 1);",
        "    find(mobile_part(expert.n*n_segments));",
        "    const mobile_part part { x.n };",
        "    layers[layer.n].n_parts = 0;",
    ],
)
def test_planted_raw_conversion_is_found(line: str) -> None:
    assert len(raw_conversions(with_line("route/mobile-route-op.cpp", line))) == 1


def test_planted_export_without_a_guard_is_found() -> None:
    declared = with_line("mobile.h", "LLAMA_API int32_t mobile_planted(struct llama_context * ctx);")
    body = "int32_t mobile_planted(struct llama_context * ctx) {\n    %s\n}\n"
    api = "api/mobile-api.cpp"

    def complaints(code: str) -> list[str]:
        return unguarded_exports({**declared, api: SOURCES[api] + code})

    assert complaints("") == ["mobile_planted is not defined"]
    assert len(complaints(body % "return std::string(ctx->name()).size();")) == 1
    # a statement before the guard is outside it
    assert len(complaints(body % "work(ctx);\n    return mobile_guard([&] { return MOBILE_OK; });")) == 1
    assert len(complaints(body % "return mobile_guard([&] { return MOBILE_OK; });\n    work(ctx);")) == 1
    assert complaints(body % "return mobile_guard([&] { return MOBILE_OK; });") == []
    assert complaints(body % "return mobile_guard([&] {\n        return MOBILE_OK;\n    });") == []
