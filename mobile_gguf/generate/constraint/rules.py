"""What rules of a grammar lead to, which are regular, and repetition where it is written as recursion."""

from __future__ import annotations

from collections.abc import Iterator

from mobile_gguf.errors import UsageError

from .gbnf import EMPTY, Alt, Node, Ref, Repeat, Seq, Token
from .limits import MAX_CHAIN


def parts_of(node: Node) -> tuple[Node, ...]:
    """The nodes right below."""
    if isinstance(node, Seq):
        return node.parts
    if isinstance(node, Alt):
        return node.choices
    return (node.node,) if isinstance(node, Repeat) else ()


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, not through references."""
    pending = [node]
    while pending:
        at = pending.pop()
        yield at
        pending += parts_of(at)


def names_in(node: Node) -> set[str]:
    """The rules that a node names."""
    return {part.name for part in walk(node) if isinstance(part, Ref)}


def order_rules(rules: dict[str, Node]) -> tuple[list[str], set[str]]:
    """The rules that root leads to, each behind those that it leads to, and which of them are recursive.

    Raises UsageError for chains that are too long.
    """
    edges = {name: sorted(names_in(node)) for name, node in rules.items()}
    # Tarjan's components, without recursion
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    order: list[str] = []
    recursive: set[str] = set()
    longest: dict[str, int] = {}
    work: list[tuple[str, int]] = [("root", 0)]
    while work:
        name, i = work.pop()
        if name not in index:
            index[name] = low[name] = len(index)
            stack.append(name)
            on_stack.add(name)
        for j in range(i, len(edges[name])):
            other = edges[name][j]
            if other not in index:
                work += [(name, j), (other, 0)]
                break
            if other in on_stack:
                low[name] = min(low[name], low[other])
        else:
            if low[name] == index[name]:
                component = [stack.pop()]
                while component[-1] != name:
                    component.append(stack.pop())
                on_stack.difference_update(component)
                if len(component) > 1 or name in edges[name]:
                    recursive.update(component)
                below = {other for one in component for other in edges[one]} - set(component)
                length = len(component) + max((longest[other] for other in below), default=0)
                if length > MAX_CHAIN:
                    raise UsageError(f"the grammar has more than {MAX_CHAIN} rules one in the other")
                longest.update(dict.fromkeys(component, length))
                order += component
    return order, recursive


def unrolled(name: str, node: Node, never: int) -> Node:
    """A rule that calls itself only at the end, or only at the beginning, of alternatives: as a repetition.

    Without an alternative that ends it, it never does: what it then wants is the token that does not exist.
    """
    choices = list(_choices(node))
    for at in (-1, 0):
        again: list[Node] = []
        ends: list[Node] = []
        for choice in choices:
            parts = list(choice.parts) if isinstance(choice, Seq) else [choice]
            if parts and parts[at] == Ref(name):
                del parts[at]
                again.append(Seq(tuple(parts)))
            else:
                ends.append(choice)
        if not again or any(name in names_in(part) for part in again + ends):
            continue
        loop = Repeat(_one_of(again), 0, None)
        end = _one_of(ends) if ends else Token(never)
        return Seq((loop, end) if at else (end, loop))
    return node


def _choices(node: Node) -> Iterator[Node]:
    if isinstance(node, Alt):
        for choice in node.choices:
            yield from _choices(choice)
    elif isinstance(node, Repeat) and (node.least, node.most) == (0, 1):
        yield from _choices(node.node)
        yield EMPTY
    else:
        yield node


def _one_of(choices: list[Node]) -> Node:
    return choices[0] if len(choices) == 1 else Alt(tuple(choices))
