"""What a GBNF grammar accepts, by definition: sets of ends of every part at every place of a short text."""

from __future__ import annotations

from mobile_gguf.generate.constraint.gbnf import Alt, Chars, Node, Ref, Repeat, Seq, read_gbnf


def accepts(grammar: str, text: str) -> bool:
    """Whether ``text`` is in the language of ``grammar``, which has no tokens."""
    rules = read_gbnf(grammar)
    places = range(len(text) + 1)
    ends: dict[tuple[str, int], set[int]] = {(name, at): set() for name in rules for at in places}

    def after(node: Node, starts: set[int]) -> set[int]:
        if isinstance(node, Chars):
            return {
                at + 1
                for at in starts
                if at < len(text) and any(low <= ord(text[at]) <= high for low, high in node.ranges)
            }
        if isinstance(node, Ref):
            return set().union(*(ends[node.name, at] for at in starts))
        if isinstance(node, Alt):
            return set().union(*(after(choice, starts) for choice in node.choices))
        if isinstance(node, Seq):
            for part in node.parts:
                starts = after(part, starts)
            return starts
        assert isinstance(node, Repeat)
        found = set(starts) if node.least == 0 else set()
        for times in range(1, (node.most if node.most is not None else node.least + len(text) + 1) + 1):
            starts = after(node.node, starts)
            if times >= node.least:
                found |= starts
            if not starts or times > node.least + len(text) + 1:
                break
        return found

    changed = True
    while changed:
        changed = False
        for name, node in rules.items():
            for at in places:
                found = after(node, {at})
                if not found <= ends[name, at]:
                    ends[name, at] |= found
                    changed = True
    return len(text) in ends["root", 0]
