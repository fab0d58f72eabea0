"""A constraint from what a caller gives: GBNF text or a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from mobile_gguf.errors import UsageError

from .lark import gbnf_to_lark
from .matching import Constraint, check_grammar, make_constraint
from .reading import check_size, read_schema
from .schema import loosened, prepare
from .tokens import TokenTable

# A token may be any that fits, not only the one that the tokenizer would choose.
HEAD = '%llguidance {"no_forcing": true}\n'
# Between the parts of JSON, at most: a model that likes blanks has to go on.
_SPACE = r"\x20"


def schema_grammar(schema: dict[str, Any]) -> str:
    """What the library compiles, of what ``prepare`` makes."""
    text = json.dumps({"x-guidance": {"whitespace_pattern": _SPACE}, **schema}, allow_nan=False)
    return LLMatcher.grammar_from_lark(f"{HEAD}start: %json {text}")


def constraint_of(
    table: TokenTable,
    grammar: str | None,
    json_schema: Any,
    should_stop: Callable[[], bool] | None = None,
) -> Constraint:
    """The Constraint of one of the two. Raises UsageError for both, and for what cannot be followed."""
    if grammar is not None and json_schema is not None:
        raise UsageError("give a grammar or a JSON schema, not both")
    what = "grammar" if grammar is not None else "JSON schema"
    try:
        if grammar is not None:
            made = LLMatcher.grammar_from_lark(HEAD + gbnf_to_lark(grammar, table))
        else:
            schema = read_schema(json_schema) if isinstance(json_schema, str) else json_schema
            made = schema_grammar(prepare(schema))
    except RecursionError:
        raise UsageError(f"the {what} has too many parts one in the other") from None
    return make_constraint(made, table, what, should_stop)


@lru_cache(maxsize=256)
def _loosened(text: str) -> tuple[str, tuple[str, ...]]:
    schema, notes = loosened(json.loads(text))
    check_grammar(schema_grammar(prepare(schema)), "JSON schema")
    return json.dumps(schema), notes


def followable(schema: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A schema of which all can be followed, and what was left out of ``schema`` for that, a line each.

    Where more than single keywords is in the way, it is any object.
    """
    try:
        check_size(schema)
        text, notes = _loosened(json.dumps(schema))
    except (UsageError, RecursionError) as error:
        return {"type": "object"}, (str(error),)
    return json.loads(text), notes
