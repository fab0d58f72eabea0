"""Write the tables of docs/families.md: what models are made of and a context keeps, and what runs.

    make docs

The dimensions, and where they were read, are in tests/support/real_dimensions.py; what runs is what
tests/convert/test_families.py expects of each family.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from families_page import modes_table
from real_dimensions import REAL_MODELS
from real_models import RealModel

from mobile_gguf.gguf.caches import Caches, layers_that_run, read_caches
from mobile_gguf.gguf.facts import Facts

PAGE = Path(__file__).parent / "families.md"
BEGIN, MODES, END = "<!-- memory: generated -->", "<!-- modes: generated -->", "<!-- end -->"
_KIB, _MIB, _GIB, _BILLION = 1 << 10, 1 << 20, 1 << 30, 1e9
_COLUMNS = (
    "model", "parameters (stated)", "active (stated)", "experts", "dense", "tables", "a token", "1000 tokens",
    "state", "32768 tokens",
)  # fmt: skip


def table() -> str:
    """The table, counted anew."""
    rows = [_line(_COLUMNS), "|---" + "|---:" * (len(_COLUMNS) - 1) + "|"]
    return "\n".join([*rows, *map(_row, REAL_MODELS)])


def page() -> str:
    """The whole page with its tables."""
    text = PAGE.read_text(encoding="utf-8")
    for begin, made in ((BEGIN, table()), (MODES, modes_table())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n{made}\n{END}{after}"
    return text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(model: RealModel) -> str:
    counts, caches = model.counts, _caches(model)
    token = caches.token_bytes(True)
    return _line(
        (
            model.name,
            f"{counts.total / _BILLION:.1f} B ({model.total:g} B)",
            f"{counts.active / _BILLION:.1f} B ({model.active:g} B)",
            f"{counts.experts / _BILLION:.1f} B",
            f"{counts.dense / _BILLION:.2f} B",
            f"{counts.table / _BILLION:.1f} B" if counts.table else "",
            f"{token / _KIB:.4g} KiB",
            f"{1000 * token / _MIB:.4g} MiB",
            f"{caches.state_bytes / _MIB:.4g} MiB" if caches.state_bytes else "",
            f"{caches.n_bytes(32768, True) / _GIB:.3g} GiB",
        )
    )


def _caches(model: RealModel) -> Caches:
    metadata = {f"{model.architecture}.{name}": value for name, value in model.numbers.items()}
    facts = Facts(Path(model.name), model.architecture, metadata)
    return read_caches(facts, layers_that_run(facts, ()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
