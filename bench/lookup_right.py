"""How often look-up drafts are right, by how long the match is: what a tuner starts from.

``python -m mobile_gguf.bench.lookup_right MODEL TEXT...`` reads texts with a model's vocabulary, as if each
were an answer, and compares every place's draft with what follows. No pass is run. A row for each kind of
text, by the end of its name, and class of matches: how many there were, and the share of tokens that are
right at each place of a draft, if those before were.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.generate.speculation.lookup import Lookup, class_of
from mobile_gguf.generate.speculation.tuner import MOST
from mobile_gguf.options.words import OFF
from mobile_gguf.wording import markdown_table

_BEHIND = 64  # tokens that are there before the first place
Counts = list[list[int]]  # of each place: tokens that were compared, and right ones of them


def count(tokens: Sequence[int], found: dict[str, Counts]) -> None:
    """Add a text's drafts to what was found, by class of matches."""
    lookup = Lookup(tokens[:_BEHIND])
    for i in range(_BEHIND, len(tokens) - MOST):
        draft, match = lookup.draft(MOST)
        if draft:
            counts = found.setdefault(class_of(match), [[0, 0] for _ in range(MOST)])
            for place, token in enumerate(draft):
                is_right = token == tokens[i + place]
                counts[place][0] += 1
                counts[place][1] += is_right
                if not is_right:
                    break
        lookup.add([tokens[i]])


def main() -> int:
    """Run the command."""
    import mobile_gguf

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--most", type=int, default=16000, help="characters of a text")
    args = parser.parse_args()
    found: dict[str, dict[str, Counts]] = defaultdict(dict)
    with mobile_gguf.load(args.model, n_ctx=512, warm=OFF, speculate=OFF) as model:
        for path in args.texts:
            text = path.read_text(encoding="utf-8", errors="replace")[: args.most]
            count(model.tokenize(text, special=False), found[path.suffix or path.name])
    rows = [["texts", "match", "matches", *(str(place + 1) for place in range(MOST))]]
    for kind, classes in sorted(found.items()):
        for name, counts in sorted(classes.items()):
            shares = [f"{right / n:.2f}" if n else "" for n, right in counts]
            rows.append([kind, name, str(counts[0][0]), *shares])
    print("\n".join(markdown_table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
