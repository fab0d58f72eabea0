"""How large a grammar or a schema may be: checked before the library sees it, which recurses.

The library's own limits are fuel, not time: what a step or a compilation may use up. They stand here as well.
"""

from __future__ import annotations

from llguidance import LLParserLimits

# Of the text of a grammar or a schema.
MAX_BYTES = 512 << 10
# Rules, groups, classes, characters and repetitions of a grammar; values in a schema.
MAX_NODES = 50_000
# Groups within groups, schemas within schemas.
MAX_DEPTH = 64
# Rules that lead to rules, references to references, without an end: compilation recurses through them.
MAX_CHAIN = 400
# Of an object's own properties, and of alternatives in one place.
MAX_WIDTH = 2_000
# Repetitions in one place, and of repeated repetitions together.
MAX_REPEAT = 100_000
# Values of one enum.
MAX_ENUM = 20_000

# Compilation runs in a thread with this stack: several times what MAX_CHAIN takes.
MAKING_STACK = 64 << 20
MAKING_SECONDS = 10.0
# Of a processor, for one token: the work of an ambiguous grammar grows with the cube of the answer's length.
STEP_SECONDS = 1.0


def library_limits() -> LLParserLimits:
    """What the library may use up: about 0.1 s to begin, 50 ms at a step."""
    return LLParserLimits(
        max_items_in_row=5_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=500_000,
        step_max_items=250_000,
        max_lexer_states=150_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )
