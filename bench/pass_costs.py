"""What a pass takes over the tokens of one answer and of several, with both kinds of kernels.

``python -m mobile_gguf.bench.pass_costs MODEL`` runs passes over 1 to 8 tokens of 1 to 8 sequences, all in
memory, and says what each took of the processor in units of a single token: with tiles, as several answers
are computed together, and with the kernels of single rows, as the drafts of one are. What a token costs of a
batch says what drafts of a batch can win at best: of passes whose tokens all cost the same, nothing. The
least of the rounds counts, so that it may run beside other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from mobile_gguf.options.words import OFF
from mobile_gguf.wording import markdown_table

SEQUENCES, TOKENS = (1, 2, 4, 8), (1, 2, 3, 4, 5, 8)
_BEHIND = 256  # tokens that are there before
_APART = 300  # from one sequence's text to the next


def measure(path: str, threads: int | None, rounds: int) -> dict[tuple[int, int, bool], float]:
    """The least seconds of the processor by sequences, tokens of each, and whether rows are single ones'."""
    import mobile_gguf
    from mobile_gguf.api.model import backend_of
    from mobile_gguf.generate.context.decoder import Slice

    options: dict[str, Any] = {"threads": threads, "n_ctx": 8192, "parallel": max(SEQUENCES), "warm": OFF}
    found: dict[tuple[int, int, bool], float] = {}
    with mobile_gguf.load(path, ram_budget="100%", **options) as model:
        from llama_cpp import llama_cpp

        decoder = backend_of(model).decoder
        text = model.tokenize(Path(statistics.__file__).read_text(encoding="utf-8"), special=False)
        parts = [text[i * _APART : (i + 1) * _APART] for i in range(max(SEQUENCES))]
        for i, part in enumerate(parts):
            decoder.run([Slice(i, 0, part[:_BEHIND])])
        for _ in range(rounds):
            for n in SEQUENCES:
                for m in TOKENS:
                    for singly in (False, True) if n == 1 else (False,):
                        slices = [
                            Slice(
                                i,
                                _BEHIND,
                                parts[i][_BEHIND : _BEHIND + m],
                                every_output=True,
                                is_drafted=singly,
                            )
                            for i in range(n)
                        ]
                        began = time.process_time()
                        decoder.run(slices)
                        llama_cpp.llama_synchronize(decoder.native.ctx)
                        took = time.process_time() - began
                        found[n, m, singly] = min(took, found.get((n, m, singly), took))
                        for i in range(n):
                            decoder.cut(_BEHIND, i)
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    found = measure(args.model, args.threads, args.rounds)
    one = found[1, 1, False]
    rows = [["sequences", "tokens of each", "tokens", "tiles", "of a token", "single rows", "of a token"]]
    for n in SEQUENCES:
        for m in TOKENS:
            costs = [found[n, m, singly] / one for singly in (False, True) if (n, m, singly) in found]
            cells = [cell for cost in costs for cell in (f"{cost:.2f}", f"{cost / (n * m):.2f}")]
            cells += [""] * (4 - len(cells))
            rows.append([str(n), str(m), str(n * m), *cells])
    print("\n".join(markdown_table(rows)))
    print(f"\na single token: {1e3 * one:.1f} ms of the processor")
    for m in TOKENS[1:]:
        best = m * found[8, 1, False] / found[8, m, False]
        print(f"8 answers, drafts of {m - 1}, all of them right: {best:.2f} times as many tokens at best")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
