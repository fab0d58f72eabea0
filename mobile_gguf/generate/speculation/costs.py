"""What a pass over several tokens takes: a model that is fitted to passes as they come.

A pass over n tokens computes for c(n) = c(1) * (1 + jump + slope * (n - 1)), n > 1, and
waits for the bytes of its missing experts. How many different experts n tokens want grows more slowly than n,
about as n ** 0.7 (measured on real routing, docs/speculation.md), and so do bytes: b(n) = b(1) + extra *
(n ** 0.7 - 1). What a byte takes is measured. Kernels work on blocks of rows, so that a line is not all of
it: what passes of one number of tokens took beside what the line says is kept by that number. All of it
fades, for caches fill and machines get busy; where single tokens twice take quite another time than before,
it is forgotten at once.

A pass over another number of tokens than the one before has its graph built anew: ``anew`` more, whatever it
computes. That is seen by single tokens, of which one follows several and the next follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of how many different experts n consecutive tokens want, in units of one token's.
UNION = 0.7
# What is left of an observation when the next one comes.
_FADES = 0.95
# A pass that took so many times what was expected counts as one that took that much: something else ran.
_MOST = 2.0
# What is taken to be so before anything was seen, and how many observations that is worth.
_SLOPE, _SLOPE_WORTH, _JUMP_WORTH, _EXTRA_WORTH = 0.6, 2.0, 4.0, 1.0
# What passes of one number of tokens took beside the line: so many seem to have been on it.
# of those over a token more or less a share counts.
_LINE_WORTH, _NEAR = 10.0, 0.6
# A single token that takes so many times as long as those before, or as much less, may be of another machine.
_JUMPED = 1.4
# What is left then of what is known of several tokens.
_KEPT = 0.1
# Pairs of single tokens until it is known what another number of tokens takes; what a pair may say at most.
_PAIRS, _ANEW_MOST = 3, 0.5


@dataclass(frozen=True)
class Step:
    """A pass over ``n_tokens`` of one or several answers: ``seconds``, of which ``waited`` for ``n_bytes``.

    ``n_needs``: different experts, summed over the layers; ``n_before``: tokens of the pass before, 0 where
    that was another's.
    """

    n_tokens: int
    seconds: float
    waited: float = 0.0
    n_bytes: int = 0
    n_needs: int = 0
    n_before: int = 0

    @property
    def is_anew(self) -> bool:
        return self.n_before != self.n_tokens


def usual_cost(n_tokens: int) -> float:
    """What a pass over so many tokens usually takes, in units of a single one's."""
    return 1.0 + _SLOPE * (n_tokens - 1)


@dataclass
class Mean:
    """A mean that fades."""

    value: float = 0.0
    n: float = 0.0

    def add(self, value: float, fades: float = _FADES) -> None:
        self.n = self.n * fades + 1.0
        self.value += (value - self.value) / self.n


@dataclass
class StepCosts:
    """Seconds, bytes and experts of a pass by its number of tokens; ``observe`` single ones and others."""

    compute: Mean = field(default_factory=Mean)  # of a single token, seconds
    n_bytes: Mean = field(default_factory=Mean)
    n_needs: Mean = field(default_factory=Mean)
    n_observed: int = 0  # passes over several tokens
    n_last: int = 0  # tokens of the last pass
    # of passes over several tokens the share that one over another number came after
    leaves: Mean = field(default_factory=lambda: Mean(1.0, 1.0))
    # what a pass over another number of tokens takes more, in units of a single token
    _anew: Mean = field(default_factory=lambda: Mean(0.0, 1.0))
    _behind_several: float = (
        0.0  # what the single token took that the last pass was over, if several were before
    )
    _waited: float = 0.0  # ... for so many bytes
    _read: float = 0.0
    # of passes over several tokens: sums of squares and products of (1, n - 1, c(n)/c(1) - 1)
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _extra: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _union: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _beside: dict[int, Mean] = field(default_factory=dict)  # of passes over n tokens, in units of the line
    _other: tuple[int, float] = (
        0,
        0.0,
    )  # of single tokens in a row that took another time: where, and the last

    @property
    def is_known(self) -> bool:
        """Whether it is known what passes take."""
        return self.compute.n + self.n_observed > 1.5  # two of them: the first fades

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last single token took quite another time than those before: the next one says more."""
        return bool(self._other[0])

    @property
    def wants_pair(self) -> bool:
        """Whether a single token now would say what the last one took for following several, which is not
        known well yet."""
        return self._behind_several > 0 and self._anew.n <= _PAIRS

    @property
    def anew_seconds(self) -> float:
        """What a pass takes more where the one before was over another number of tokens."""
        return max(0.0, self._anew.value) * self.compute.value

    def observe(self, step: Step) -> None:
        self._waited = self._waited * _FADES + step.waited
        self._read = self._read * _FADES + step.n_bytes
        if step.n_before > 1:
            self.leaves.add(step.is_anew)
        computed = max(step.seconds - step.waited, 1e-9)
        self.n_last, behind, self._behind_several = step.n_tokens, self._behind_several, 0.0
        if step.n_tokens == 1:
            if behind and not step.is_anew:
                self._anew.add(max(-_ANEW_MOST, min(behind / computed - 1.0, _ANEW_MOST)))
            if step.n_before > 1:
                self._behind_several = computed
            self._observe_single(computed / (1.0 + max(0.0, self._anew.value) * step.is_anew))
            self.n_bytes.add(step.n_bytes)
            self.n_needs.add(step.n_needs)
        else:
            if not self.compute.n:  # until single ones are seen
                self.compute.value = computed / usual_cost(step.n_tokens)
            self._observe_several(step, max(computed - self.anew_seconds * step.is_anew, 1e-9))

    def _observe_single(self, computed: float) -> None:
        mean = self.compute
        if mean.n < 3:
            mean.add(computed)
            return
        side = (computed > _JUMPED * mean.value) - (computed * _JUMPED < mean.value)
        was, before = self._other
        self._other = side, computed
        if side and side == was:
            mean.value, mean.n, self._other = (before + computed) / 2, 2.0, (0, 0.0)
            # what passes over several took was in units of another machine's single tokens
            self._sums = [_KEPT * old for old in self._sums]
            self._beside.clear()
            return
        mean.add(min(computed, _MOST * mean.value))

    def _observe_several(self, step: Step, computed: float) -> None:
        self.n_observed += 1
        computed = min(computed, _MOST * self._computed(step.n_tokens))
        self._beside.setdefault(step.n_tokens, Mean()).add(computed / self._line(step.n_tokens))
        x, y = float(step.n_tokens - 1), computed / self.compute.value - 1.0
        new = (1.0, x, x * x, y, x * y)
        self._sums = [old * _FADES + value for old, value in zip(self._sums, new, strict=True)]
        width = step.n_tokens**UNION - 1.0
        for kept, more in (
            (self._extra, step.n_bytes - self.n_bytes.value),
            (self._union, step.n_needs - self.n_needs.value),
        ):
            kept[0] = kept[0] * _FADES + width
            kept[1] = kept[1] * _FADES + more

    def _fit(self) -> tuple[float, float]:
        """Jump and slope, drawn to what they are taken to be where little is known (ridge regression)."""
        n, x, xx, y, xy = self._sums
        y, xy = y - _SLOPE * x, xy - _SLOPE * xx
        n, xx = n + _JUMP_WORTH, xx + _SLOPE_WORTH
        determinant = n * xx - x * x
        jump, slope = (xx * y - x * xy) / determinant, (n * xy - x * y) / determinant
        return jump, _SLOPE + slope

    def _line(self, n_tokens: int) -> float:
        jump, slope = self._fit()
        # more tokens take no less
        return self.compute.value * max(1.0, 1.0 + jump + slope * (n_tokens - 1))

    def _computed(self, n_tokens: int) -> float:
        if n_tokens == 1:
            return self.compute.value
        # what was seen nearby says something as well
        n, total = _LINE_WORTH, _LINE_WORTH
        for other, beside in self._beside.items():
            counts = beside.n * _NEAR ** abs(other - n_tokens)
            n, total = n + counts, total + counts * beside.value
        return max(self.compute.value, self._line(n_tokens) * total / n)

    @property
    def extra_bytes(self) -> float:
        """Bytes that are read more for ``n ** 0.7 - 1`` of 1."""
        return max(0.0, _drawn(self._extra, self.n_bytes.value))

    def bytes_of(self, n_tokens: int) -> float:
        """Bytes that a pass over so many tokens has read."""
        return self.n_bytes.value + self.extra_bytes * (n_tokens**UNION - 1.0)

    def needs_of(self, n_tokens: int) -> float:
        """Different experts that a pass over so many tokens wants, summed over the layers."""
        more = max(0.0, _drawn(self._union, self.n_needs.value))
        return self.n_needs.value + more * (n_tokens**UNION - 1.0)

    @property
    def seconds_per_byte(self) -> float:
        return self._waited / self._read if self._read > 0 else 0.0

    def seconds_of(self, n_tokens: int) -> float:
        """What a pass over so many tokens takes."""
        return self._computed(n_tokens) + self.bytes_of(n_tokens) * self.seconds_per_byte


def _drawn(kept: list[float], single: float) -> float:
    """A ratio of sums, drawn to that of single tokens, whose experts are as many as before."""
    width, more = kept
    return (more + _EXTRA_WORTH * single) / (width + _EXTRA_WORTH)
