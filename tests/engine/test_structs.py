"""Every struct and enum of mobile.h has its mirror, and the mirror agrees."""

import ctypes

import pytest
from engine_header import HEADER, constant, header_enums, header_structs

from mobile_gguf.engine import structs

STRUCTS, ENUMS = header_structs(), header_enums()
NUMBERS = {
    "mobile_eviction": structs.EVICTION,
    "mobile_io": structs.IO,
    "mobile_miss": structs.MISS,
    "mobile_placement": structs.PLACEMENT,
    "mobile_prefetch": structs.PREFETCH,
    "mobile_guessed": structs.GUESSED,
    "mobile_observe": structs.OBSERVE,
    "mobile_substitute": structs.SUBSTITUTE,
}


def mirror_name(struct: str) -> str:
    return "".join(part.capitalize() for part in struct.removeprefix("mobile_").split("_")) + "Struct"


def mirrors() -> dict[str, type[ctypes.Structure]]:
    return {name: value for name, value in vars(structs).items() if name.endswith("Struct")}


def test_every_struct_of_the_header_has_a_mirror_and_every_mirror_a_struct():
    assert HEADER.count("\nstruct mobile_") == len(STRUCTS) > 0
    assert {mirror_name(struct) for struct in STRUCTS} == set(mirrors())


@pytest.mark.parametrize("struct", STRUCTS)
def test_mirrors_have_the_headers_fields(struct):
    assert list(mirrors()[mirror_name(struct)]._fields_) == STRUCTS[struct]


@pytest.mark.parametrize(
    "name", [name for name in mirrors() if hasattr(structs, name.removesuffix("Struct"))]
)
def test_dataclasses_have_their_structs_fields(name):
    plain = getattr(structs, name.removesuffix("Struct"))
    assert [field[0] for field in mirrors()[name]._fields_] == list(plain.__dataclass_fields__)


@pytest.mark.parametrize("enum", NUMBERS)
def test_numbers_are_the_headers(enum):
    assert ENUMS[enum] == NUMBERS[enum]


def test_every_enum_is_held_against_something():
    assert HEADER.count("\nenum mobile_") == len(ENUMS)
    # which predictor is a question of tests only
    assert set(ENUMS) - set(NUMBERS) == {"mobile_status", "mobile_residency", "mobile_predict"}
    assert list(ENUMS["mobile_residency"].values()) == [
        structs.NOT_RESIDENT, structs.LOADING, structs.RESIDENT
    ]  # fmt: skip
    assert constant("MOBILE_ABI_VERSION") == structs.ABI_VERSION


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("    uint64_t n_misses;", "    uint64_t n_missed;"),
        ("    uint64_t n_misses;", "    int64_t n_misses;"),
        ("    uint64_t n_misses;", "    uint64_t n_misses;\n    uint64_t n_more;"),
    ],
)
def test_another_header_is_noticed(was, now):
    assert was in HEADER
    changed = header_structs(HEADER.replace(was, now, 1))
    assert changed["mobile_counters"] != list(structs.CountersStruct._fields_)
