# ruff: noqa: E501  (tables)
"""GBNF: the language is kept, whatever the grammar; what is none, or too large, is one clear line."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from gbnf_oracle import accepts
from grammar_walk import END, byte_table, walk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mobile_gguf.errors import AnswerStopped, GrammarError, UsageError
from mobile_gguf.generate.constraint.making import constraint_of

pytestmark = pytest.mark.slow

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws # with escapes
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""

# a grammar of grammars takes its time, and throws many away
SLOW_ONES = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def constraint(grammar: str):
    return constraint_of(byte_table(), grammar, None)


def ends_in_an_answer_or_one_line(work: Callable[[], bytes | None]) -> bytes | None:
    """What ``work`` gives, or None where it ends in an error, whose text is a line."""
    reason = "fine"
    try:
        return work()
    except (UsageError, GrammarError) as error:
        reason = str(error)
    assert reason.isprintable()
    return None


def takes(grammar: str, text: str) -> bool:
    """Whether the constraint goes through ``text``, a byte at a time, and may end there."""
    made = constraint(grammar)
    for byte in text.encode():
        if byte not in made.allowed():
            return False
        made.accept(byte)
    return made.is_complete


# the language is kept

ATOMS = st.sampled_from(
    ["[ab]", '"a"', '"ab"', '"b"', '"ba"', "[a-c]", '""', "r1", "r2", "root", "[^a]", '"c"']
)
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,}"])


def _join(parts: list[str]) -> str:
    return " ".join(parts)


BODIES = st.recursive(
    st.builds(str.__add__, ATOMS, REPEATS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(_join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({' | '.join(parts)})"),
        st.builds(lambda part, times: f"({part}){times}", inner, REPEATS),
    ),
    max_leaves=6,
)
GRAMMARS = st.builds("root ::= {}\nr1 ::= {}\nr2 ::= {}\n".format, BODIES, BODIES, BODIES)
TEXTS = ["".join(chars) for n in range(5) for chars in itertools.product("abc", repeat=n)]


@settings(max_examples=50, suppress_health_check=SLOW_ONES)
@example('root ::= [a-c]+ "b" | "a" root "c"\nr1 ::= "a"\nr2 ::= "a"\n')
@example('root ::= "a" "bc" | "ab" "a" | "c" root "c"\nr1 ::= "a"\nr2 ::= "a"\n')
@example('root ::= r1 r2\nr1 ::= "a"* | "b" r1 "b"\nr2 ::= "a" r2 | "ab"\n')
@given(GRAMMARS)
def test_whatever_the_grammar_its_language_is_kept(grammar):
    try:
        made = constraint(grammar)
    except UsageError:  # of what nothing satisfies
        assert not any(accepts(grammar, text) for text in TEXTS)
        return
    matcher = made._matcher
    for text in TEXTS:
        matcher.reset()
        taken = matcher.try_consume_tokens([*text.encode()]) == len(text) and matcher.is_accepting()
        assert taken == accepts(grammar, text), (grammar, text)


@settings(max_examples=50, suppress_health_check=SLOW_ONES)
@given(GRAMMARS, st.integers(0, 5))
def test_whatever_the_grammar_an_answer_or_one_line_comes_of_it(grammar, seed):
    answer = ends_in_an_answer_or_one_line(lambda: walk(constraint(grammar), seed, 40))
    assert answer is None or len(answer) > 6 or accepts(grammar, answer.decode())


@settings(max_examples=200, suppress_health_check=SLOW_ONES)
@given(st.text(alphabet='root:=\n "[]()|*+?{},\\xu0a<>!#.^-', max_size=60).map("root ::= ".__add__))
def test_any_text_is_a_grammar_or_one_clear_line(text):
    ends_in_an_answer_or_one_line(lambda: walk(constraint(text), 1, 20))


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (JSON, ['{"a" : [1, -2.5e3, "x\\n", {}]}', "{}\n  "], ["{,}", '{"a"}', '{"a":\n\n1}', '{"a":01}']),
        ('root ::= [a-z]+ "b" | "(" root ")"', ["ab", "bb", "((xyzb))"], ["b", "(ab", "ac"]),
        ('root ::= ("ab" | "a")* "c"', ["c", "abac", "aac"], ["bc", "ab"]),
        (r'root ::= "\x41\u00e9\U0001F600\"\\\n" [\]\-]', ['Aé😀"\\\n]', 'Aé😀"\\\n-'], ["A"]),
        ("root ::= # a comment\n  ( # another\n  [0-9]{2} |\n  . )", ["12", "é", "\n"], ["1a", ""]),
        ('root ::= "a"{0} "b"{2,} # the end', ["bb", "bbbb"], ["ab", "b"]),
        ('root ::= "" | "a" root "b"', ["", "ab", "aabb"], ["a", "ba"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["ab"]),
        ("root-x_1 ::= 'a'".replace("'", '"') + "\nroot ::= root-x_1", ["a"], ["b"]),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_is_taken_and_what_is_not(grammar, yes, no):
    assert [text for text in yes if not takes(grammar, text)] == []
    assert [text for text in no if takes(grammar, text)] == []


def test_a_token_stands_for_itself_and_never_for_its_text():
    made = constraint('root ::= "a" <|im_end|>')
    made.accept(ord("a"))
    assert made.allowed().tolist() == [END]
    assert (
        not takes('root ::= "<|im_end|>" | "x"', "<")
        or END not in constraint('root ::= "<|im_end|>"').allowed()
    )
    think = byte_table().named("<think>")
    assert constraint("root ::= <think> .").allowed().tolist() == [think]
    assert constraint(f"root ::= <[{think}]> .").allowed().tolist() == [think]
    others = constraint("root ::= !<think> .").allowed()
    assert think not in others
    assert ord("a") in others


def test_a_grammar_without_an_end_goes_on():
    made = constraint("root ::= [a-z ] root")
    for _ in range(2000):
        made.accept(ord("x"))
    allowed = made.allowed()
    assert END not in allowed
    assert ord("y") in allowed


def test_only_the_end_is_left_where_the_grammar_allows_no_more():
    made = constraint('root ::= "yes" | "no"')
    for byte in b"no":
        made.accept(byte)
    assert made.allowed().tolist() == [END]


def test_where_no_token_fits_it_is_said():
    made = constraint(r'root ::= "a" "\x04"')  # byte 4 is in no token
    made.accept(ord("a"))
    with pytest.raises(GrammarError, match="cannot be followed further: no token of this model fits"):
        made.allowed()
    with pytest.raises(UsageError, match="no token of this model fits"):
        constraint(r'root ::= "\x04"')


# what is no grammar, or too large

BAD = [
    ("", "is empty"), ("  # nothing", "is empty"), ('a ::= "b"', "no rule named root"),
    ("root ::= (", "line 1: a group is not closed"), ('root ::= "a', "line 1: quotes or brackets are not closed"),
    ('root ::=\n "a" b', "line 2: there is no rule b"), ("root ::= [z-a]", "ends before it begins"),
    (r"root ::= [^\x00-\U0010FFFF]", "is no character"), (r'root ::= "\q"', "is no escape"),
    (r'root ::= "\u12"', "needs 4 hexadecimal digits"), ('root ::= "a" )', "is not expected here"),
    ('root := "a"', "::= is missing"), ("root ::= *", "is not expected here"), ('root ::= "a"{2', "not closed by }"),
    ('root ::= "a"{3,2}', "is no range"), ('root ::= "a"{x}', "followed by no number"),
    ('root ::= "a"\n\nroot ::= "b"', "line 3: the rule root is there twice"), ("root ::= <nope", "begins no token"),
    ("root ::= <[x]>", "has no token id"), ("root ::= <nope>", "wants the token '<nope>'"), ("root ::= !a", "no token"),
    ("root ::= <[999]>", "wants token 999, and the model has"), ("\x00", "where a rule's name is expected"),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "reason"), BAD, ids=lambda one: repr(one)[:30])
def test_what_is_no_grammar_is_refused_in_one_line(grammar, reason):
    with pytest.raises(UsageError, match=reason.replace("[", r"\[")) as error:
        constraint(grammar)
    assert str(error.value).isprintable()


def _chain(n: int) -> str:
    return "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"'


BOMBS = {
    "20,000 groups": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "a chain of 30,000 rules": _chain(30_000),
    "a chain within the bounds": _chain(390),
    "groups in a chain": "root ::= r0\n"
    + "".join(f'r{i} ::= ("(" (r{i + 1} | "x"){{0,3}} ")" | "y")*\n' for i in range(390)) + 'r390 ::= "a"',
    "groups in a circle": "root ::= r0\n"
    + "".join(f'r{i} ::= ("(" (r{(i + 1) % 390} | "x"){{0,3}} ")" | "y")*\n' for i in range(390)),
    "text without an end": "root ::= " + '"a" ' * 200_000,
    "many parts": "root ::= " + '"a" ' * 60_000,
    "stacked repetitions": "root ::= [a]" + "*" * 1000,
    "repetitions of repetitions": "root ::= ((([a-z]?{0,90000}){0,90000}){0,90000}){0,90000}",
    "doubling rules": "root ::= d0\n" + "".join(f"d{i} ::= d{i + 1} d{i + 1}\n" for i in range(300)) + 'd300 ::= "a"',
    "doubling within recursion": 'root ::= "(" root ")" | d0\n'
    + "".join(f"d{i} ::= d{i + 1} d{i + 1} | d{i + 1}\n" for i in range(100)) + 'd100 ::= [a-z] | "ab"',
    "ambiguous": 'root ::= s\ns ::= [a-z ] s x | [a-z ] s y | [a-z ]\nx ::= "1"\ny ::= "2"',
    "more ambiguous": "root ::= root root | [a-z ] | [a-z] root",
    "empty loops": 'root ::= (("a"?)*)* root?',
    "many alternatives": "root ::= " + " | ".join(f'"word{i}"' for i in range(5_000)),
    "many literals in a rule": "root ::= " + " | ".join(f'"({i}" root' for i in range(2_000)) + ' | "x"',
    "mutual rules": "".join(f"r{i} ::= r{(i * 7 + 1) % 300} [a-z] | r{(i * 3) % 300} | \"a\"\n" for i in range(300))
    + "root ::= r0",
}  # fmt: skip


@pytest.mark.parametrize("grammar", BOMBS.values(), ids=BOMBS)
def test_bombs_end_in_an_answer_or_in_one_line(grammar):
    ends_in_an_answer_or_one_line(lambda: walk(constraint(grammar), 1, 60))


SCHEMA_BOMBS = {
    "repetitions of repetitions": {"type": "string", "pattern": "^((a{0,100}){0,100})$"},
    "more of them": {"type": "string", "pattern": "^((((a?){0,999}){0,999}){0,999}b)$"},
    "a deep pattern": {"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000},
    "900 optional properties": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(900)}},
    "9,000 optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(9_000)}},
    "900 and others": {"type": "object", "properties": {f"p{i}": {} for i in range(900)}, "additionalProperties": True},
    "a huge enum": {"enum": [f"value {i}" for i in range(20_000)]},
    "a huger enum": {"enum": [f"value {i}" for i in range(40_000)]},
    "a chain of references": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(5_000)} | {"a5000": {}},
    },
    "a chain within the bounds": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(390)} | {"a390": {}},
    },
    "products of alternatives": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(30)]
    },
    "1,000 overlapping alternatives": {
        "anyOf": [{"type": "object", "properties": {f"p{i}": {}, "q": {}}} for i in range(1_000)]
    },
    "oneOf of many": {"oneOf": [{"const": i} for i in range(200)]},
    "numbers": {"type": "integer", "minimum": -(2**53), "maximum": 2**53, "multipleOf": 999},
    "other numbers": {"type": "number", "minimum": 1e-9, "maximum": 1e15, "multipleOf": 997},
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMA_BOMBS.values(), ids=SCHEMA_BOMBS)
def test_bombs_of_schemas_end_in_an_answer_or_in_one_line(schema):
    ends_in_an_answer_or_one_line(lambda: walk(constraint_of(byte_table(), None, schema), 1, 60))


def test_compiling_ends_when_nobody_waits():
    with pytest.raises(AnswerStopped):
        constraint_of(byte_table(), JSON, None, lambda: True)


def test_compiling_has_a_limit(monkeypatch):
    from mobile_gguf.generate.constraint import matching

    may_end = threading.Event()

    def slow(*_args: object, **_options: object) -> None:
        may_end.wait(300)
        raise AssertionError

    monkeypatch.setattr(matching, "LLMatcher", slow)
    try:
        with pytest.raises(UsageError, match=r"takes longer than 0\.05 s to compile"):
            matching.make_constraint("start: /a/", byte_table(), "grammar", None, 0.05)
    finally:
        may_end.set()


def test_a_step_has_a_limit(monkeypatch):
    from mobile_gguf.generate.constraint import matching

    made = constraint("root ::= root root | [a-z ]")
    monkeypatch.setattr(matching, "STEP_SECONDS", -1.0)
    with pytest.raises(GrammarError, match="too ambiguous"):
        made.allowed()


def test_one_of_grammar_and_schema():
    with pytest.raises(UsageError, match="not both"):
        constraint_of(byte_table(), JSON, {})
