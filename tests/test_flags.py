"""Options as words of a command line: what is written is what is read."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.flags import add_arguments, arguments
from mobile_gguf.flags import given as given_by
from mobile_gguf.options import GenerateOptions, LoadOptions, declared, defaults, make_options
from mobile_gguf.options.bias import parse_bias
from mobile_gguf.options.source import parse_source
from mobile_gguf.options.tokens import (
    MAX_PARALLEL,
    MAX_TOKENS,
    parse_parallel,
    parse_switch,
    parse_tokens_or_auto,
)
from mobile_gguf.options.words import SPECULATE
from mobile_gguf.sizes import (
    AUTO,
    OFF,
    Size,
    parse_bytes,
    parse_bytes_or_off,
    parse_size,
    parse_size_or_off,
    size_flag,
)

words = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12)
sizes = st.one_of(
    st.just(AUTO),
    st.integers(1, 1 << 50).map(lambda n: Size(n_bytes=n)),
    # shares as people write them
    st.integers(1, 10_000).map(lambda n: parse_size(f"{n / 100}%")),
)


def values(opt, default):
    """What an option may be, as parsing leaves it; its default among that."""
    if opt.is_flag:
        return st.booleans()
    if opt.choices:
        one = st.sampled_from(opt.choices)
    elif opt.read is parse_size:
        one = sizes
    elif opt.read is parse_size_or_off:
        one = st.one_of(st.just(OFF), sizes)
    elif opt.read is parse_tokens_or_auto:
        one = st.one_of(st.just("auto"), st.integers(1, MAX_TOKENS))
    elif opt.read is parse_parallel:
        one = st.one_of(st.just("auto"), st.integers(1, MAX_PARALLEL))
    elif opt.read is parse_source:
        models = words.filter(str.strip).map(lambda word: f"draft={word}")
        one = st.one_of(st.sampled_from(SPECULATE), models)
    elif opt.read is parse_switch:
        one = st.sampled_from((True, False, "auto"))
    elif opt.read is parse_bytes:
        one = sizes.filter(lambda size: size.fraction is None)
    elif opt.read is parse_bytes_or_off:
        one = st.one_of(st.just(OFF), sizes.filter(lambda size: size.fraction is None))
    elif opt.read is parse_bias:
        one = st.tuples(st.integers(0, 1 << 20), st.floats(-100, 100))
    elif opt.read in (int, float):
        low = -1e6 if opt.low is None else opt.low
        high = 1e6 if opt.high is None else opt.high
        one = st.integers(int(low), int(high)) if opt.read is int else st.floats(low, high)
    else:
        one = words.filter(bool) if opt.repeated else words
    one = st.lists(one, min_size=1, max_size=3) if opt.repeated else one
    return one if default is None or opt.repeated else st.one_of(st.just(default), one)


def options_of(kind):
    """Random options: any of them left at their defaults."""
    usual = defaults(kind)
    drawn = {name: values(opt, usual[name]) for name, opt in declared(kind).items()}
    return st.fixed_dictionaries({}, optional=drawn).map(lambda found: make_options(kind, found))


def parsed(kind, argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, kind)
    return make_options(kind, given_by(parser.parse_args(argv), kind))


@pytest.mark.parametrize("kind", [LoadOptions, GenerateOptions])
@given(data=st.data())
def test_what_is_written_is_what_is_read(kind, data):
    options = data.draw(options_of(kind))
    assert parsed(kind, arguments(options)) == options


def another(opt, default):
    """A value that is not the default."""
    if opt.is_flag:
        return not default
    if opt.choices:
        return next(choice for choice in opt.choices if choice != default)
    ones = {int: 3, float: 0.25, parse_bias: (7, 1.0), parse_tokens_or_auto: 3, parse_switch: True}
    one = (ones | {parse_parallel: 3, parse_source: "draft=a"}).get(opt.read, "5MiB")
    return [one] if opt.repeated else one


@pytest.mark.parametrize("kind", [LoadOptions, GenerateOptions])
def test_defaults_need_no_words_and_every_other_value_does(kind):
    assert arguments(kind()) == []
    for name, opt in declared(kind).items():
        words = arguments(kind(**{name: another(opt, defaults(kind)[name])}))
        assert words[0].split("=")[0] in opt.flags


def test_values_of_the_api_are_written_too():
    asked = {
        "stop": "-x", "logit_bias": {15: -100}, "json_schema": {"type": "string"}, "cache_prompt": False,
        "seed": -1,
    }  # fmt: skip
    options = make_options(GenerateOptions, asked)
    assert arguments(options) == [
        "-l", "15-100.0", "-s=-1", "--stop=-x", "-j", '{"type": "string"}', "--no-cache-prompt",
    ]  # fmt: skip
    load = make_options(LoadOptions, {"ram_budget": "40%", "vram_budget": 3 << 30, "n_ubatch": 512})
    assert arguments(load, also=("n_ubatch",)) == [
        "--ram-budget", "40%", "--vram-budget", "3GiB", "-ub", "512",
    ]  # fmt: skip


@given(sizes)
def test_a_size_is_written_to_the_byte(size):
    assert parse_size(size_flag(size)) == size
