"""A grammar in the library's notation, Lark, from GBNF."""

from __future__ import annotations

from mobile_gguf.errors import UsageError, shown

from .gbnf import Alt, Chars, Node, Ref, Repeat, Seq, Token, read_gbnf
from .lexemes import Many, Row, Shape, Word, shape_rules
from .rules import order_rules, unrolled
from .tokens import TokenTable

# Deeper groups get a name: the library reads about thirty.
_MAX_NESTED = 10
_NOTHING = '""'


def gbnf_to_lark(text: str, table: TokenTable) -> str:
    """The same language, for tokens of ``table``. Raises UsageError with the line of what is wrong."""
    rules = read_gbnf(text)
    rules = {name: unrolled(name, node, table.never) for name, node in rules.items()}
    order, recursive = order_rules(rules)
    return _Writer(rules, table).write(shape_rules(rules, order, recursive))


class _Writer:
    def __init__(self, rules: dict[str, Node], table: TokenTable) -> None:
        self._rules = rules
        self._table = table
        self._lines: list[str] = []
        self._words: dict[Word, str] = {}
        self._terminals: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._n_extra = 0

    def write(self, shapes: dict[str, Shape]) -> str:
        self._names = {name: "start" if name == "root" else f"r{i}" for i, name in enumerate(shapes)}
        for name, shape in shapes.items():
            self._lines.append(f"{self._names[name]}: {self._rule(shape)[0]}")
        return "\n".join(self._lines) + "\n"

    def _named(self, made: tuple[str, int], prefix: str) -> tuple[str, int]:
        """Text that is nested too deep gets a line of its own."""
        text, nested = made
        if nested < _MAX_NESTED:
            return made
        self._n_extra += 1
        name = f"{prefix}{self._n_extra}"
        self._lines.append(f"{name}: {text}")
        return name, 0

    # rules: text, and how deep its brackets are nested

    def _rule(self, shape: Shape) -> tuple[str, int]:
        if isinstance(shape, Word):
            return self._word(shape), 0
        if isinstance(shape, Ref):
            return self._names[shape.name], 0
        if isinstance(shape, Token):
            return self._token(shape), 0
        if isinstance(shape, Many):
            if shape.most == 0:
                return _NOTHING, 0
            text, nested = self._named(self._rule(shape.node), "x")
            return f"({text}){_times(shape.least, shape.most)}", nested + 1
        parts = shape.parts if isinstance(shape, Row) else shape.choices
        made = [self._named(self._rule(part), "x") for part in parts]
        return _joined(made, " " if isinstance(shape, Row) else " | ")

    def _word(self, word: Word) -> str:
        if word not in self._words:
            text, _ = self._terminal(word.node)
            name = self._words[word] = f"W{len(self._words)}"
            self._lines.append(f"{name}: {text}")
        return self._words[word]

    def _token(self, token: Token) -> str:
        known = self._table
        found = token.name if isinstance(token.name, int) else known.named(token.name)
        if found is None:
            raise UsageError(f"the grammar wants the token {shown(token.name)}: this model has none")
        if found > known.never:
            raise UsageError(f"the grammar wants token {found}, and the model has {known.never:,} tokens")
        return f"<[^{found}]>" if token.others else f"<[{found}]>"

    # terminals: what a word consists of

    def _terminal(self, node: Node) -> tuple[str, int]:
        if isinstance(node, Chars):
            return f"/{_class(node)}/", 0
        if isinstance(node, Ref):
            if node.name not in self._terminals:
                text, _ = self._terminal(self._rules[node.name])
                name = self._terminals[node.name] = f"T{len(self._terminals)}"
                self._lines.append(f"{name}: {text}")
            return self._terminals[node.name], 0
        if isinstance(node, Repeat):
            if node.most == 0:
                return _NOTHING, 0
            text, nested = self._named(self._terminal(node.node), "X")
            return f"({text}){_times(node.least, node.most)}", nested + 1
        if isinstance(node, Alt):
            return _joined([self._named(self._terminal(choice), "X") for choice in node.choices], " | ")
        assert isinstance(node, Seq)
        made: list[tuple[str, int]] = []
        literal = ""
        for part in (*node.parts, None):
            if isinstance(part, Chars):
                literal += _class(part)
                continue
            if literal:
                made.append((f"/{literal}/", 0))
                literal = ""
            if part is not None:
                made.append(self._named(self._terminal(part), "X"))
        return _joined(made, " ")


def _joined(made: list[tuple[str, int]], between: str) -> tuple[str, int]:
    if not made:
        return _NOTHING, 0
    if len(made) == 1:
        return made[0]
    return f"({between.join(text for text, _ in made)})", 1 + max(nested for _, nested in made)


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _class(chars: Chars) -> str:
    """One character in a regular expression; all that is no letter or digit by its number."""
    parts = [_char(low) if low == high else f"{_char(low)}-{_char(high)}" for low, high in chars.ranges]
    if len(chars.ranges) == 1 and chars.ranges[0][0] == chars.ranges[0][1]:
        return parts[0]
    return f"[{''.join(parts)}]"


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"
