"""Another engine's command as an arm, and the replay model as text."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from replay_model import TINY, TINY_TRACE

from mobile_gguf.bench.arm import Arm, Runner, text_of
from mobile_gguf.bench.build import ensure_model
from mobile_gguf.bench.other import DEFAULT_PATTERN, OtherCommand, parse_other, read_speed, run_other
from mobile_gguf.bench.plan import BenchOptions, plan_arms
from mobile_gguf.bench.report import Report, doubts
from mobile_gguf.bench.sweep import SweepChoices, sweep
from mobile_gguf.bench.text import N_CHARACTERS, add_tokenizer, characters, prompt_text
from mobile_gguf.errors import UsageError
from mobile_gguf.sizes import GIB

SECONDS = 600
PRINTED = """\
perf: prompt eval time =     100.00 ms /    28 tokens (    3.57 ms per token,   280.00 tokens per second)
perf:        eval time =    1000.00 ms /    31 runs   (   32.26 ms per token,    31.00 tokens per second)
"""


def python(code: str, *more: str) -> str:
    return shlex.join([sys.executable, "-c", code, "{model}", *more])


def test_speeds_of_llama_cpp_are_read() -> None:
    said = read_speed(DEFAULT_PATTERN, PRINTED)
    assert (said.tokens_per_s, said.prompt_tokens_per_s, said.error) == (31.0, 280.0, "")


def test_the_last_match_counts_and_one_group_is_enough() -> None:
    assert read_speed(r"([\d.]+) t/s", "1.5 t/s\n2.5 t/s\n").tokens_per_s == 2.5


@pytest.mark.parametrize(
    ("pattern", "output", "says"),
    [
        (r"([\d.]+) t/s", "nothing", "printed nothing that --vs-pattern"),
        (r"(\S+) t/s", "fast t/s", "no number"),
        (r"([\d.]+) t/s", "0.0 t/s", "says 0 tokens/s"),
        (r"(\S+) t/s", "nan t/s", "says nan tokens/s"),
    ],
)
def test_what_states_no_speed_is_an_error(pattern: str, output: str, says: str) -> None:
    said = read_speed(pattern, output)
    assert said.tokens_per_s is None
    assert says in said.error


@pytest.mark.parametrize(
    ("command", "pattern", "says"),
    [
        ("", "(x)", "is empty"),
        ("other -m x.gguf", "(x)", "no {model} in it"),
        ("other '{model}", "(x)", "No closing quotation"),
        ("other {model} {modle}", "(x)", "may hold {model}, {prompt}"),
        ("other {model} {0}", "(x)", "may hold {model}, {prompt}"),
        ("other {model} {", "(x)", "may hold {model}, {prompt}"),
        ("other {model}", "(", "--vs-pattern"),
        ("other {model}", "x", "has no group"),
    ],
)
def test_commands_that_cannot_work_are_refused(command: str, pattern: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        parse_other(command, pattern)


def test_places_are_filled_within_a_word_and_braces_are_kept() -> None:
    code = "import sys; print(sys.argv[2:], 5, 't/s')"
    other = parse_other(python(code, "--model={model}", "a b", "{{x}}", "{tokens}"), r"([\d.]+) t/s")
    values = {"model": "m n.gguf", "prompt": "p", "tokens": "3"} | dict.fromkeys(
        ("threads", "budget_bytes", "budget_mib", "cap_bytes"), "1"
    )
    said = run_other(other, values, None, SECONDS)
    assert said.tokens_per_s == 5
    assert "['--model=m n.gguf', 'a b', '{x}', '3']" in said.output


def test_failures_of_a_command_are_said() -> None:
    values = {"model": "x"}

    def fails(command: str, limit_s: float = SECONDS) -> str:
        return run_other(parse_other(command, "(x)"), values, None, limit_s).error

    assert "cannot run no-such-engine: No such file" in fails("no-such-engine {model}")
    assert fails(python("import sys; sys.exit('no such option')")) == "ended with status 1: no such option"
    assert "not done after 0.5 s" in fails(python("import time; time.sleep(600)"), 0.5)


def arm_of(other: OtherCommand) -> Arm:
    return Arm("other", "exact", "25%", GIB, 2 * GIB, command=other)


def test_a_command_is_an_arm_of_its_own(tmp_path: Path) -> None:
    others = tuple(parse_other("other {model}", "(x)", number) for number in (1, 2))
    options = BenchOptions(budgets=("100%",), modes=("exact",), others=others)
    arms, _ = plan_arms(options, TINY, available_bytes=64 * GIB)
    assert [arm.label for arm in arms] == [
        "stock exact 100%", "command 1 100%", "command 2 100%", "engine exact 100%",
    ]  # fmt: skip
    arm = arms[1]
    assert sweep(arm, SweepChoices((1, 2), (2,)), 1, lambda _arm: pytest.fail("swept")) == (arm, [])
    assert arm.settings == "as given"

    # a command that goes through the trace, and one that prints something else
    follows = characters(TINY_TRACE.n_prompt, 4)
    for text, expected in ((follows, True), ("hello", False)):
        other = parse_other(python(f"print({text!r}, 2.0, 't/s')"), r"([\d.]+) t/s")
        runner = Runner(tmp_path / "m.gguf", text_of(TINY_TRACE), {}, 1)
        run = runner.run(arm_of(other), 4, SECONDS)
        assert (run.tokens_per_s, run.n_tokens, run.error, run.follows) == (2.0, 4, "", expected)
        report = Report("c", "h", {}, {}, True, {}, runs={arm_of(other).label: [run]})
        assert any("did not print the trace's text" in note for note in doubts(report, 1, 64)) is not expected


def test_more_steps_than_characters_are_refused() -> None:
    with pytest.raises(UsageError, match=f"there are characters for {N_CHARACTERS}"):
        add_tokenizer(None, N_CHARACTERS + 1)


def test_the_model_goes_through_the_trace_as_text(tmp_path: Path) -> None:
    """Tokenized, decoded and put into text again by our own command line, as by any other's."""
    model = ensure_model(TINY_TRACE, TINY, tmp_path)
    command = shlex.join(
        [
            sys.executable, "-m", "mobile_gguf", "run", "{model}", "{prompt}", "--raw", "-n", "{tokens}",
            "--temp", "0", "--mode", "exact",
        ]
    )  # fmt: skip
    pattern = r"(?P<decode>[\d.]+) tok/s"
    runner = Runner(model, text_of(TINY_TRACE), {}, 1)
    run = runner.run(arm_of(parse_other(command, pattern)), TINY_TRACE.n_decode, SECONDS)
    assert (run.error, run.follows) == ("", True)
    assert prompt_text(TINY_TRACE) == characters(0, TINY_TRACE.n_prompt)
