"""What of a grammar the library may read as one word (a lexeme) without a change of the language.

GBNF knows no words: any split of the text counts. The library reads the longest word that any rule allows
at a place. The two agree if no character that may follow a word also goes on in it, or in another that begins
alike. So: the largest regular parts of a grammar are made words, words that disagree are split, and single
characters, which never disagree, are what is left at worst. Aho, Lam, Sethi, Ullman, Compilers, 3.9 and 4.4,
for the automata (first, last, following positions) and for first and following sets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from mobile_gguf.errors import UsageError

from .gbnf import MAX_CODE, Alt, Chars, Node, Ref, Repeat, Seq, Token
from .limits import MAX_NODES
from .rules import walk

_MAX_POSITIONS = 2_000
_MAX_PAIRS = 20_000
_MAX_ROUNDS = 40


@dataclass(frozen=True)
class Word:
    """A regular part of the grammar that is read as one."""

    node: Node


@dataclass(frozen=True)
class Many:
    """A repetition between words."""

    node: Shape
    least: int
    most: int | None


@dataclass(frozen=True)
class Row:
    """Words and rules one after the other."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class Choice:
    """One of several."""

    choices: tuple[Shape, ...]


Shape = Word | Many | Row | Choice | Ref | Token


def shape_rules(rules: dict[str, Node], order: list[str], recursive: set[str]) -> dict[str, Shape]:
    """The rules that stay rules, ``root`` among them, with the words in them."""
    shaper = _Shaper(rules, order, recursive)
    if isinstance(shaper.shapes["root"], Word):  # all of it is one
        return {"root": shaper.shapes["root"]}
    with contextlib.suppress(_TooLarge):
        for _ in range(_MAX_ROUNDS):
            split = _conflicts(shaper.shapes, rules)
            if not split:
                return shaper.shapes
            shaper.split(split)
    while words := {word for word in _words(shaper.shapes) if not isinstance(word.node, Chars)}:
        shaper.split(words)
    return shaper.shapes


class _Shaper:
    def __init__(self, rules: dict[str, Node], order: list[str], recursive: set[str]) -> None:
        self._rules = rules
        self._regular: set[str] = set()
        sizes: dict[str, int] = {}
        for name in order:
            if name not in recursive and self._is_regular(rules[name]):
                self._regular.add(name)
                sizes[name] = sum(
                    sizes[part.name] if isinstance(part, Ref) else 1 for part in walk(rules[name])
                )
                if sizes[name] > MAX_NODES:
                    raise UsageError(
                        f"the grammar's rule {name} has more than {MAX_NODES:,} parts, all in all"
                    )
        self.shapes = {"root": self._shape(rules["root"])}
        for name in reversed(order):
            if name not in self._regular and name != "root":
                self.shapes[name] = self._shape(rules[name])

    def _is_regular(self, node: Node) -> bool:
        return all(
            part.name in self._regular if isinstance(part, Ref) else not isinstance(part, Token)
            for part in walk(node)
        )

    def _shape(self, node: Node) -> Shape:
        if self._is_regular(node):
            return Word(node)
        if isinstance(node, Seq):
            parts: list[Shape] = []
            run: list[Node] = []
            for part in node.parts:
                if self._is_regular(part):
                    run.append(part)
                    continue
                if run:
                    parts.append(Word(Seq(tuple(run))))
                    run = []
                parts.append(self._shape(part))
            return Row((*parts, Word(Seq(tuple(run)))) if run else tuple(parts))
        if isinstance(node, Alt):
            regular = tuple(choice for choice in node.choices if self._is_regular(choice))
            others = tuple(self._shape(choice) for choice in node.choices if not self._is_regular(choice))
            return Choice((Word(Alt(regular)), *others) if regular else others)
        if isinstance(node, Repeat):
            return Many(self._shape(node.node), node.least, node.most)
        assert isinstance(node, (Ref, Token))
        return node

    def split(self, words: set[Word]) -> None:
        """Read these words in their parts from now on."""
        done: set[str] = set()
        while names := set(self.shapes) - done:
            for name in names:
                done.add(name)
                self.shapes[name] = self._split(self.shapes[name], words)

    def _split(self, shape: Shape, words: set[Word]) -> Shape:
        if isinstance(shape, Row):
            return Row(tuple(self._split(part, words) for part in shape.parts))
        if isinstance(shape, Choice):
            return Choice(tuple(self._split(choice, words) for choice in shape.choices))
        if isinstance(shape, Many):
            return Many(self._split(shape.node, words), shape.least, shape.most)
        if not isinstance(shape, Word) or shape not in words:
            return shape
        node = shape.node
        if isinstance(node, Seq):
            return Row(tuple(map(Word, node.parts)))
        if isinstance(node, Alt):
            return Choice(tuple(map(Word, node.choices)))
        if isinstance(node, Repeat):
            return Many(Word(node.node), node.least, node.most)
        if isinstance(node, Ref):
            # a rule of its own, so that what many name is not written out for each
            self.shapes.setdefault(node.name, Word(self._rules[node.name]))
            return node
        return shape


def _words(shapes: dict[str, Shape]) -> dict[Word, None]:
    found: dict[Word, None] = {}
    pending = list(shapes.values())
    while pending:
        shape = pending.pop()
        if isinstance(shape, Word):
            found[shape] = None
        elif isinstance(shape, Many):
            pending.append(shape.node)
        elif isinstance(shape, Row):
            pending += shape.parts
        elif isinstance(shape, Choice):
            pending += shape.choices
    return found


# characters: sets of them are bits, one for each range that no class of the grammar divides


class _Alphabet:
    def __init__(self, rules: dict[str, Node]) -> None:
        edges = {0, MAX_CODE + 1}
        for node in rules.values():
            for part in walk(node):
                if isinstance(part, Chars):
                    edges.update(edge for low, high in part.ranges for edge in (low, high + 1))
        self._number = {edge: i for i, edge in enumerate(sorted(edges))}
        self._known: dict[Chars, int] = {}

    def mask(self, chars: Chars) -> int:
        if chars not in self._known:
            mask = 0
            for low, high in chars.ranges:
                first, last = self._number[low], self._number[high + 1]
                mask |= (1 << last) - (1 << first)
            self._known[chars] = mask
        return self._known[chars]


@dataclass
class _Automaton:
    """Positions of characters in words, numbered through all of them."""

    masks: list[int] = field(default_factory=list)
    following: list[set[int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Ends:
    nullable: bool
    first: frozenset[int]
    last: frozenset[int]


class _TooLarge(Exception):
    """There is more to compare than is worth it."""


class _Builder:
    """Glushkov's automata; counted repetitions count as any number, which only finds more conflicts."""

    def __init__(self, rules: dict[str, Node], alphabet: _Alphabet) -> None:
        self._rules = rules
        self._alphabet = alphabet
        self.automaton = _Automaton()

    def build(self, node: Node, limit: int) -> _Ends:
        if isinstance(node, Chars):
            if len(self.automaton.masks) >= limit:
                raise _TooLarge
            at = len(self.automaton.masks)
            self.automaton.masks.append(self._alphabet.mask(node))
            self.automaton.following.append(set())
            return _Ends(False, frozenset((at,)), frozenset((at,)))
        if isinstance(node, Ref):
            return self.build(self._rules[node.name], limit)
        if isinstance(node, Alt):
            made = [self.build(choice, limit) for choice in node.choices]
            return _Ends(
                any(ends.nullable for ends in made),
                frozenset().union(*(ends.first for ends in made)),
                frozenset().union(*(ends.last for ends in made)),
            )
        if isinstance(node, Repeat):
            if node.most == 0:
                return _Ends(True, frozenset(), frozenset())
            ends = self.build(node.node, limit)
            if node.most != 1:
                self._join(ends.last, ends.first)
            return _Ends(ends.nullable or node.least == 0, ends.first, ends.last)
        assert isinstance(node, Seq)
        whole = _Ends(True, frozenset(), frozenset())
        for part in node.parts:
            ends = self.build(part, limit)
            self._join(whole.last, ends.first)
            whole = _Ends(
                whole.nullable and ends.nullable,
                whole.first | ends.first if whole.nullable else whole.first,
                ends.last | whole.last if ends.nullable else ends.last,
            )
        return whole

    def _join(self, before: frozenset[int], behind: frozenset[int]) -> None:
        for at in before:
            self.automaton.following[at] |= behind


def _conflicts(shapes: dict[str, Shape], rules: dict[str, Node]) -> set[Word]:
    """Words that go on where another, or they themselves, may be followed by the same character.

    Raises _TooLarge.
    """
    words = list(_words(shapes))
    builder = _Builder(rules, _Alphabet(rules))
    ends: dict[Word, _Ends] = {}
    owner: list[Word] = []
    for word in words:
        ends[word] = builder.build(word.node, _MAX_POSITIONS)
        owner += [word] * (len(builder.automaton.masks) - len(owner))
    masks, following = builder.automaton.masks, builder.automaton.following
    behind = _following(shapes, ends, masks)
    last = {at: word for word in words for at in ends[word].last}
    starts = sorted({at for word in words for at in ends[word].first})
    seen = {(p, q) for p in starts for q in starts if masks[p] & masks[q]}
    pending = list(seen)
    found: set[Word] = set()
    while pending:
        p, q = pending.pop()
        if p in last and any(masks[q2] & behind[last[p]] for q2 in following[q]):
            found.add(owner[q])
        for p2 in following[p]:
            for q2 in following[q]:
                if masks[p2] & masks[q2] and (p2, q2) not in seen:
                    seen.add((p2, q2))
                    pending.append((p2, q2))
        if len(seen) > _MAX_PAIRS:
            raise _TooLarge
    return found


def _following(shapes: dict[str, Shape], ends: dict[Word, _Ends], masks: list[int]) -> dict[Word, int]:
    """The characters that may come right behind each word."""
    first_of_word = {word: _union(masks[at] for at in made.first) for word, made in ends.items()}
    nullable: dict[str, bool] = dict.fromkeys(shapes, False)
    first: dict[str, int] = dict.fromkeys(shapes, 0)
    behind_rule: dict[str, int] = dict.fromkeys(shapes, 0)
    behind: dict[Word, int] = dict.fromkeys(ends, 0)

    def start(shape: Shape) -> tuple[bool, int]:
        if isinstance(shape, Word):
            return ends[shape].nullable, first_of_word[shape]
        if isinstance(shape, Ref):
            return nullable[shape.name], first[shape.name]
        if isinstance(shape, Many):
            inner, mask = start(shape.node)
            return (inner or shape.least == 0), (0 if shape.most == 0 else mask)
        if isinstance(shape, Choice):
            made = [start(choice) for choice in shape.choices]
            return any(empty for empty, _ in made), _union(mask for _, mask in made)
        if isinstance(shape, Row):
            whole = 0
            for part in shape.parts:
                empty, mask = start(part)
                whole |= mask
                if not empty:
                    return False, whole
            return True, whole
        return False, 0

    def follow(shape: Shape, mask: int) -> None:
        if isinstance(shape, Word):
            behind[shape] |= mask
        elif isinstance(shape, Ref):
            behind_rule[shape.name] |= mask
        elif isinstance(shape, Many):
            follow(shape.node, mask if shape.most in (0, 1) else mask | start(shape.node)[1])
        elif isinstance(shape, Choice):
            for choice in shape.choices:
                follow(choice, mask)
        elif isinstance(shape, Row):
            for part in reversed(shape.parts):
                follow(part, mask)
                empty, own = start(part)
                mask = own | mask if empty else own

    while True:
        before = dict(nullable), dict(first)
        for name, shape in shapes.items():
            nullable[name], first[name] = start(shape)
        if before == (nullable, first):
            break
    while True:
        known = dict(behind_rule), dict(behind)
        for name, shape in shapes.items():
            follow(shape, behind_rule[name])
        if known == (behind_rule, behind):
            return behind


def _union(masks: Iterable[int]) -> int:
    whole = 0
    for mask in masks:
        whole |= mask
    return whole
