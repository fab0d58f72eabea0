# ruff: noqa: E501  (tables)
"""Answers under JSON schemas: jsonschema judges them, a random walk over allowed tokens makes them."""

from __future__ import annotations

import json
import os
import random
import re
from typing import Any

import jsonschema
import pytest
from grammar_walk import byte_table, walk
from schema_samples import SCHEMAS, random_schema

from mobile_gguf.errors import UsageError
from mobile_gguf.generate.constraint.keywords import (
    ENFORCED,
    FORMATS,
    NO_CONSTRAINT,
    REFUSED,
    REFUSED_FORMATS,
)
from mobile_gguf.generate.constraint.making import constraint_of, followable
from mobile_gguf.generate.constraint.schema import prepare

# How many answers `make torture-schemas` asks for; the suite takes a few of each schema.
WALKS = int(os.environ.get("MOBILE_GGUF_SCHEMA_WALKS", "0"))


def answers(schema: Any, seeds: range) -> list[Any]:
    """Values of random answers, those that ended; every one has been checked."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    values = []
    for seed in seeds:
        answer = walk(constraint_of(byte_table(), None, schema), seed)
        if answer is not None:
            value = json.loads(answer.decode(), parse_constant=pytest.fail)
            validator.validate(value)
            values.append(value)
    return values


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_every_answer_holds(schema):
    n_walks = max(4, WALKS // len(SCHEMAS))
    assert answers(schema, range(n_walks)), "no answer came to an end"


def test_answers_under_schemas_that_nobody_wrote_hold():
    n_schemas = max(60, WALKS // 8)
    followed = 0
    for seed in range(n_schemas):
        schema = random_schema(random.Random(seed))
        try:
            prepare(schema)
            constraint_of(byte_table(), None, schema)
        except UsageError:
            continue
        followed += 1
        answers(schema, range(seed, seed + 4))
    assert followed > n_schemas / 3


# what the values are, not only that they hold


def test_every_value_of_a_small_schema_comes():
    values = answers({"type": "integer", "minimum": 7, "maximum": 12}, range(60))
    assert {*values} == {7, 8, 9, 10, 11, 12}
    values = answers({"type": ["string", "null"], "enum": ["x", None, 3]}, range(20))
    assert {*values} == {"x", None}
    assert {*answers({"type": "string", "pattern": "^ab$|^cd$"}, range(20))} == {"ab", "cd"}
    assert {*answers({"type": "string", "pattern": '^"q"$'}, range(4))} == {'"q"'}


@pytest.mark.parametrize("value", ["\U0001f600", 'a"b', "c\\d", "a\nb", "a\t/b", "é", "", "日本"])
def test_literals_are_what_they_are(value):
    assert answers({"enum": [value]}, range(3)) == [value] * 3
    named = {"type": "object", "properties": {value: {"const": 1}}, "required": [value]}
    assert answers(named, range(3)) == [{value: 1}] * 3


def test_strings_hold_no_raw_control_characters():
    for seed in range(20):
        answer = walk(constraint_of(byte_table(), None, {"type": "string", "maxLength": 40}), seed)
        assert answer is None or not any(byte < 0x20 or byte == 0x7F for byte in answer)


def test_named_properties_are_all_unless_others_are_spoken_of():
    schema = {"type": "object", "properties": {"a": {"const": 1}}}
    assert all(value in ({}, {"a": 1}) for value in answers(schema, range(20)))
    joined = {"allOf": [schema, {"properties": {"b": {"const": 2}}, "required": ["b"]}], "type": "object"}
    assert all(value["b"] == 2 for value in answers(joined, range(10)))
    both = {"$defs": {"n": schema}, "$ref": "#/$defs/n", "properties": {"b": {"const": 2}}, "required": ["b"]}
    assert all(value["b"] == 2 for value in answers({"type": "object", **both}, range(10)))


def test_blanks_have_an_end():
    constraint = constraint_of(byte_table(), None, {"type": "array", "minItems": 1})
    for char in "[ ":
        constraint.accept(ord(char))
    assert ord(" ") not in constraint.allowed()
    assert ord("\n") not in constraint.allowed()


# what is refused, by name

REFUSED_SCHEMAS = [
    ({"not": {"type": "string"}}, "not at # is not supported"),
    ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems at #/properties/a is not supported"),
    ({"if": {}, "then": {}}, "if at # is not supported"),
    ({"contains": {}}, "contains at #"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired at #"),
    ({"anyOf": [{}, {"propertyNames": {"maxLength": 3}}]}, "propertyNames at #/anyOf/1"),
    ({"multipleOf": 0.01}, "multipleOf at # is 0.01"),
    ({"multipleOf": 0}, "multipleOf at # is 0"),
    ({"type": "integer", "minimum": 10**20}, "minimum at # is 100000000000000000000"),
    ({"type": "integer", "maximum": -1e300}, "maximum at #"),
    ({"exclusiveMinimum": True}, "exclusiveMinimum at # is True: a number"),
    ({"minimum": float("nan")}, "minimum at # is nan"),
    ({"enum": [float("inf")]}, "enum at # has inf, which is no value of JSON"),
    ({"const": {"a": [10**30]}}, "const at # has 10000"),
    ({"enum": ["a\0b"]}, "enum at # has text with U.0000"),
    ({"const": "\ud800"}, "half a surrogate pair"),
    ({"type": "foo"}, "type at # is 'foo': one of null"),
    ({"type": []}, "type at #"),
    ({"enum": []}, "enum at # is no list of values"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf at # has schemas that may hold at once"),
    ({"$ref": "#/$defs/none"}, "[$]ref at # leads to '#/[$]defs/none', which is not in the schema"),
    ({"$ref": "http://example.com/x"}, "which is not in the schema"),
    ({"$ref": "#"}, "no token of this model fits"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no token of this model fits"),
    ({"format": "regex"}, "format at # regex is not supported"),
    ({"pattern": r"\bword"}, "pattern at # cannot be followed: word boundaries"),
    ({"pattern": "(?=a)"}, "look-around"),
    ({"pattern": r"(a)\1"}, "back-references"),
    ({"pattern": "(?i)a"}, r"\(\?i is not supported"),
    ({"pattern": "["}, "brackets that are not closed"),
    ({"pattern": "a{"}, "begins no count"),
    ({"pattern": "a{2,1}"}, "is no range"),
    ({"pattern": "(a"}, "a group that is not closed"),
    ({"pattern": "a)"}, "closes a group"),
    ({"pattern": r"\q"}, "is not supported"),
    ({"pattern": "a\\"}, "ends in a backslash"),
    ({"pattern": r"^\u0000$", "type": "string"}, "U.0000"),
    ({"pattern": r"^\x00$", "type": "string"}, "U.0000"),
    ({"minProperties": 2}, "minProperties at # of 2 is not supported"),
    ({"type": "string", "minLength": -1}, "minLength at # is -1: a whole number"),
    ({"minItems": 10**9}, "minItems at # is 1000000000: at most 100,000"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
    (False, "nothing satisfies it"),
    (3, "3 at # is no schema"),
    ({"properties": {"a": 3}}, "3 at #/properties/a is no schema"),
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON: it is nested too deep"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), REFUSED_SCHEMAS, ids=lambda one: str(one)[:50])
def test_what_cannot_be_followed_is_refused_by_name(schema, reason):
    with pytest.raises(UsageError, match=reason) as error:
        constraint_of(byte_table(), None, schema)
    assert str(error.value).isprintable()


NO_EFFECT = [
    {"uniqueItems": False}, {"uniqueItems": True, "maxItems": 1}, {"then": {}}, {"if": {}}, {"minContains": 2},
    {"contains": {}, "minContains": 0}, {"not": False}, {"propertyNames": {"type": "string"}},
    {"unevaluatedProperties": True}, {"dependentRequired": {}}, {"format": "int32"}, {"nullable": True},
    {"x-guidance": {"lenient": True}}, {"title": "A", "default": 1, "examples": [1]}, {"minProperties": 0},
]  # fmt: skip


@pytest.mark.parametrize("schema", NO_EFFECT, ids=str)
def test_what_constrains_nothing_costs_nothing(schema):
    assert prepare(schema) == prepare({name: schema[name] for name in schema if name == "maxItems"})


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_each_refused_keyword_is_refused(keyword):
    values = {"uniqueItems": True, "unevaluatedProperties": False, "unevaluatedItems": False}
    schema = {
        keyword: values.get(keyword, {"a": {"type": "null"}}),
        **({"if": {}} if keyword == "then" else {}),
    }
    schema |= {"if": {"type": "null"}, "then": {}} if keyword in ("if", "else") else {}
    schema |= {"contains": {}} if "Contains" in keyword else {}
    with pytest.raises(UsageError, match="is not supported"):
        prepare(schema)


def test_the_docs_list_what_becomes_of_each_keyword(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "schemas.md").read_text()
    for heading, words in (
        ("Followed", ENFORCED),
        ("Without effect", NO_CONSTRAINT),
        ("Refused", REFUSED),
        ("Formats that are followed", FORMATS),
        ("Formats that are refused", REFUSED_FORMATS),
    ):
        section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
        assert {word for row in listed for word in re.findall(r"`([^`]+)`", row)} == set(words), heading


# a tool's parameters: what cannot be followed is left free

LOOSENED = [
    ({"properties": {"a": {"uniqueItems": True, "type": "array"}}}, {"properties": {"a": {"type": "array"}}}),
    ({"pattern": r"\b", "maxLength": 3}, {"maxLength": 3}),
    ({"oneOf": [{}, {}]}, {}),
    ({"patternProperties": {r"\b": {}}, "additionalProperties": False}, {}),
    ({"anyOf": [{"not": {}}, {"type": "null"}]}, {"anyOf": [{}, {"type": "null"}]}),
    ({"$defs": {"a": {"if": {}, "then": {}}}, "$ref": "#/$defs/a"}, {"$defs": {"a": {}}, "$ref": "#/$defs/a"}),
    ({"properties": {"a": 3}}, {"type": "object"}),
    ({"minLength": 3, "maxLength": 2, "type": "string"}, {"type": "object"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "left"), LOOSENED, ids=lambda one: str(one)[:50])
def test_what_cannot_be_followed_can_be_left_out_with_a_note(schema, left):
    made, notes = followable(schema)
    assert made == left
    assert notes
    assert all(note.isprintable() for note in notes)
    assert followable(left) == (left, ())
