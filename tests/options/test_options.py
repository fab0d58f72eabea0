"""Options: declared once, read from keywords, flags and /set alike."""

import argparse
import inspect

import pytest

from mobile_gguf import flags
from mobile_gguf.api.model import Model, load
from mobile_gguf.errors import UsageError
from mobile_gguf.options import GenerateOptions, LoadOptions, declared, defaults, make_options
from mobile_gguf.sizes import Size


def parse(*argv):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser, LoadOptions)
    flags.add_arguments(parser, GenerateOptions, skip=declared(LoadOptions))
    return parser.parse_args(argv)


def refused(capsys, *argv):
    with pytest.raises(SystemExit):
        parse(*argv)
    return capsys.readouterr().err


def test_only_what_is_given_is_set():
    args = parse("--temp", "0.2", "-c", "1024")
    assert flags.given(args, LoadOptions) == {"n_ctx": 1024}
    assert flags.given(args, GenerateOptions) == {"temperature": 0.2}


def test_llama_cpps_flags():
    line = """-t 3 -tb 4 -b 64 -ub 32 -fa -s 7 -n 9 --top-k 1 --top-p 0.5 --min-p 0.1 --typical 0.9
        --repeat-penalty 1.1 --presence-penalty 0.1 --frequency-penalty -0.2 -r STOP --stop END
        --ram-budget 40% --mode big-little --gamma 1.01 --little-k 2 --io-threads 8
        --eviction moepic -j {} --no-cache-prompt -v"""
    args = parse(*line.split(), "--grammar", "root ::= x")
    load_options = make_options(LoadOptions, flags.given(args, LoadOptions))
    assert (
        load_options.threads,
        load_options.threads_batch,
        load_options.n_batch,
        load_options.n_ubatch,
    ) == (3, 4, 64, 32)
    assert (load_options.flash_attn, load_options.seed, load_options.ram_budget) == (
        True,
        7,
        Size(fraction=0.4),
    )
    assert (load_options.mode, load_options.gamma, load_options.little_k) == ("big-little", 1.01, 2)
    options = make_options(GenerateOptions, flags.given(args, GenerateOptions))
    assert (options.max_tokens, options.stop, options.cache_prompt) == (9, ("STOP", "END"), False)
    assert (options.grammar, options.json_schema, options.frequency_penalty) == ("root ::= x", "{}", -0.2)


def test_a_grammar_from_a_file(tmp_path, capsys):
    file = tmp_path / "g.gbnf"
    file.write_text("root ::= [a-z]+")
    assert parse("--grammar-file", str(file)).grammar == "root ::= [a-z]+"
    assert "cannot read" in refused(capsys, "--json-schema-file", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temp", "-1"], "temperature is -1.0: it must be at least 0"),
        (["--temp", "x"], "invalid number value: 'x'"),
        (["--top-k", "1.5"], "invalid whole number value: '1.5'"),
        (["--top-p", "2"], "top_p is 2.0: it must be at most 1"),
        (["--mode", "fast"], "mode is 'fast': choose exact, little, big-little"),
        (["--ram-budget", "2X"], "'2X' is not a size"),
        (["--little-k", "0"], "little_k is 0: it must be at least 1"),
        (["--gamma", "nan"], "gamma is nan: it must be a number"),
    ],
)
def test_bad_values_are_refused_with_the_reason(capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "40% of them" in text
    assert "(default: 0.8)" in text
    for options in (LoadOptions, GenerateOptions):
        for opt in declared(options).values():
            assert all(flag in text for flag in opt.flags)


def test_keywords_have_the_same_checks():
    with pytest.raises(UsageError, match="top_k is -2"):
        make_options(GenerateOptions, {"top_k": -2})
    with pytest.raises(UsageError, match="temperature is 'hot': it must be a number"):
        make_options(GenerateOptions, {"temperature": "hot"})
    with pytest.raises(UsageError, match=r"unknown option 'temprature'; did you mean temperature\?"):
        make_options(GenerateOptions, {"temprature": 1})


def test_none_means_the_default_only_where_that_is_the_default():
    assert make_options(GenerateOptions, {"seed": None}).seed is None
    with pytest.raises(UsageError, match="top_k is None"):
        make_options(GenerateOptions, {"top_k": None})


def test_changes_are_made_on_top_of_others():
    base = make_options(LoadOptions, {"gamma": 0.5, "threads": 2})
    changed = make_options(LoadOptions, {"gamma": 0.9}, base)
    assert (changed.gamma, changed.threads) == (0.9, 2)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temp", "0.2", ("temperature", 0.2)),
        ("temperature", "0", ("temperature", 0.0)),
        ("--n-predict", "5", ("max_tokens", 5)),
        ("top-k", "default", ("top_k", 40)),
        ("stop", "two words", ("stop", ("two words",))),
        ("mode", "little", ("mode", "little")),
        ("seed", "none", ("seed", None)),
        ("cache_prompt", "off", ("cache_prompt", False)),
    ],
)
def test_set(name, text, expected):
    assert flags.parse_setting(name, text, GenerateOptions) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("heat", "1", "unknown option 'heat'"),
        ("temp", "hot", "must be a number"),
        ("cache_prompt", "1", "on or off"),
    ],
)
def test_set_refuses(name, text, words):
    with pytest.raises(UsageError, match=words):
        flags.parse_setting(name, text, GenerateOptions)


def test_functions_show_the_options_they_take():
    assert set(defaults(LoadOptions)) < set(inspect.signature(load).parameters)
    for method in (Model.stream, Model.generate, Model.chat, Model.stream_chat):
        parameters = inspect.signature(method).parameters
        assert parameters["temperature"].default == 0.8
        assert all(
            parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults(GenerateOptions)
        )


def test_a_source_of_drafts_is_a_word_or_a_model(capsys):
    args = parse("--speculate", "draft=a/b.gguf")
    assert make_options(LoadOptions, flags.given(args, LoadOptions)).speculate == "draft=a/b.gguf"
    assert make_options(LoadOptions, {"speculate": " NGRAM "}).speculate == "ngram"
    for wrong in ("draft=", "both", "drafts=x", "", "Draft=x"):
        assert "is no source of drafts: choose off, auto, ngram" in refused(capsys, "--speculate", wrong)
    with pytest.raises(UsageError, match="speculate is 'draft=a': choose off"):
        make_options(GenerateOptions, {"speculate": "draft=a"})  # no answer has a file opened
