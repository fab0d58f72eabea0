"""Pricing the ladder: every rung, and a few together, step by step under a few budgets."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.loss import Buddies
from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.generate.loss.price_list import Offer, PriceList, hull_of, is_switchable
from mobile_gguf.generate.passes.corrections import Corrections
from mobile_gguf.generate.passes.decode import default_little_k
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.generate.passes.rungs import Rung, parse_rung
from mobile_gguf.generate.pricing import COLUMNS, Price, Priced, exact_rows, n_positions, opened, price
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.progress import Progress

from .checkpoint import Checkpoint
from .loss_fit import fit_loss_model
from .samples import N_PROMPT

if TYPE_CHECKING:
    from mobile_gguf.generate.llama import MobileLlama

# Shares of all experts that budgets hold.
SHARES = (0.125, 0.25, 0.5)
EXACT = "exact"
# All kinds, and what is worth having together: 50,000 passes of a model take long enough.
RUNGS = (
    "drop:0.25", "drop:0.5", "drop:0.75", "drop:1", "drop:1.5", "little-on-miss", "live:0.25",
    "prior:0.05", "prior:0.1", "prior:0.2", "drop:0.5+prior:0.1", "buddy",
)  # fmt: skip
# Shares of the top-k that little tokens have.
LITTLE = (0.5, 0.75)
# One token in so many is run exactly as well, where that is measured.
_AUDIT_EVERY = 4
_FIELDS = tuple(name for name in Price.__dataclass_fields__ if name not in ("rung", "budget"))


@dataclass(frozen=True)
class Prices:
    """What rungs cost at each budget; ``listed`` is what mode auto goes by, None: too little was lost."""

    rows: dict[float, list[Price]]
    listed: PriceList | None
    left_out: dict[str, str]  # rungs that this model does not have, and why

    def to_dict(self) -> dict[str, Any]:
        return {
            "budgets": [
                {"share": share, "prices": [asdict(row) for row in rows]} for share, rows in self.rows.items()
            ],
            "left_out": self.left_out,
        }


def rung_names(info: GgufInfo, shares: Sequence[int], corrections: Corrections) -> list[str]:
    """What is priced of a model whose head has thresholds for these shares of big tokens."""
    least = default_little_k(info.n_expert_used)
    little = [f"little:{max(least, int(share * info.n_expert_used))}" for share in LITTLE]
    little = list(dict.fromkeys(little))
    heads = [f"head:{share}" for share in (50, 70) if share in shares]
    # what is kept weighs as it did: that costs less than to give it all of the sum
    mass = f"+mass:{info.n_expert_used}"
    ladder = [f"{rung}{mass}" for rung in RUNGS] if info.n_expert_used > 2 else []
    affine = [f"little:{k}{f'+mass:{of}' if of else ''}+affine" for k, of in corrections]
    return [EXACT, *little, *(f"{rung}{mass}" for rung in little), *affine, *heads, *ladder]


def price_ladder(
    info: GgufInfo,
    blocks: Sequence[Sequence[int]],
    *,
    head: Head,
    thresholds: dict[int, float],
    buddies: Buddies,
    corrections: Corrections,
    most_bytes: int,
    threads: int,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Prices:
    """Price the rungs on blocks of tokens, under the budgets of SHARES that ``most_bytes`` allows.

    ``thresholds`` are the head's by share of big tokens.
    """
    all_bytes = info.budget_all_bytes
    by_share = {str(share): value for share, value in thresholds.items()}
    names = rung_names(info, list(thresholds), corrections)
    rungs = [parse_rung(name, info, head, by_share, corrections) for name in names]
    shares = [share for share in SHARES if share * all_bytes <= most_bytes] or [most_bytes / all_bytes]
    digests = [one.digest for one in corrections.values()]
    series = hashlib.sha256(
        repr((names, shares, len(blocks), head.bias, digests, COLUMNS)).encode()
    ).hexdigest()[:8]
    work = _Work(info, blocks, head, buddies, threads, checkpoint, series)
    jobs = [(share, rung, 0) for share in shares for rung in rungs]
    middle = shares[len(shares) // 2]
    jobs += [(middle, rung, _AUDIT_EVERY) for rung in rungs if _may_be_mixed(rung)]
    found: dict[tuple[float, str, int], Priced] = {}
    left_out: dict[str, str] = {}
    with work:
        for i, (share, rung, audit_every) in enumerate(jobs):
            progress("pricing rungs", i / len(jobs))
            if rung.name in left_out:
                continue
            try:
                priced = work.price(int(share * all_bytes), share, rung, audit_every)
            except (EngineError, UsageError) as error:
                if rung.name == EXACT:
                    raise
                left_out[rung.name] = str(error)
            else:
                found[share, rung.name, audit_every] = priced
    progress("pricing rungs", 1.0)
    rows = {
        share: [found[share, rung.name, 0].price for rung in rungs if (share, rung.name, 0) in found]
        for share in shares
    }
    mixed = [rung.name for rung in rungs if _may_be_mixed(rung) and rung.name not in left_out]
    fitted = fit_loss_model(
        {(share, name): found[share, name, 0] for share in shares for name in mixed},
        {name: found[middle, name, _AUDIT_EVERY] for name in mixed},
        middle,
        N_PROMPT,
    )
    if fitted is None:
        return Prices(rows, None, left_out)
    factors = fitted.factors | {(share, EXACT): 1.0 for share in shares}
    offers = {
        share: [
            Offer(row.rung, row.kl, row.demand_bytes, factors[share, row.rung])
            for row in of_share
            if (share, row.rung) in factors
        ]
        for share, of_share in rows.items()
    }
    return Prices(rows, PriceList(offers, fitted.model), left_out)


def hull_names(rows: Sequence[Price]) -> set[str]:
    """Which rungs of a budget are on the lower hull of bytes against KL."""
    return {offer.rung for offer in hull_of([Offer(row.rung, row.kl, row.demand_bytes) for row in rows])}


def _may_be_mixed(rung: Rung) -> bool:
    return is_switchable(rung.policy) and rung.policy.loss is not None


class _Work(contextlib.AbstractContextManager["_Work"]):
    """The model under one budget at a time, and the exact distributions, made when they are first needed."""

    def __init__(
        self,
        info: GgufInfo,
        blocks: Sequence[Sequence[int]],
        head: Head,
        buddies: Buddies,
        threads: int,
        checkpoint: Checkpoint,
        series: str,
    ) -> None:
        self.info, self.blocks, self.head, self.buddies = info, blocks, head, buddies
        self.threads, self.checkpoint, self.series = threads, checkpoint, series
        self._stack = contextlib.ExitStack()
        self._opened = contextlib.ExitStack()
        self._n_bytes = 0
        self._llama: MobileLlama | None = None
        self._exact: npt.NDArray[np.float32] | None = None

    def __exit__(self, *_error: object) -> None:
        self._exact = None
        self._opened.close()
        self._stack.close()

    def price(self, n_bytes: int, share: float, rung: Rung, audit_every: int) -> Priced:
        def make() -> dict[str, npt.NDArray[Any]]:
            priced = self._price(n_bytes, share, rung, audit_every)
            fields = np.array([getattr(priced.price, name) for name in _FIELDS])
            return {"fields": fields, "positions": np.stack(priced.positions)}

        name = hashlib.sha256(f"{share} {rung.name} {audit_every}".encode()).hexdigest()[:8]
        kept = self.checkpoint.get(f"price-{self.series}-{name}", make)
        fields: dict[str, Any] = dict(zip(_FIELDS, kept["fields"].tolist(), strict=True))
        return Priced(Price(rung=rung.name, budget=f"{share:.3g}", **fields), list(kept["positions"]))

    def _price(self, n_bytes: int, share: float, rung: Rung, audit_every: int) -> Priced:
        llama = self._under(n_bytes)
        return price(
            llama,
            rung,
            f"{share:.3g}",
            self.blocks,
            N_PROMPT,
            self._exact_rows(llama),
            audit_every=audit_every,
        )

    def _under(self, n_bytes: int) -> MobileLlama:
        if self._llama is None or n_bytes != self._n_bytes:
            self._opened.close()
            self._llama = self._opened.enter_context(
                opened(
                    self.info, n_bytes, n_ctx=len(self.blocks[0]), threads=self.threads,
                    head=self.head, buddies=self.buddies,
                )
            )  # fmt: skip
            self._n_bytes = n_bytes
        return self._llama

    def _exact_rows(self, llama: MobileLlama) -> npt.NDArray[np.float32]:
        if self._exact is None:
            file = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            n = n_positions(self.blocks, N_PROMPT)
            rows = np.memmap(file, np.float32, "w+", shape=(n, self.info.n_vocab))
            exact_rows(llama, parse_rung(EXACT, self.info, None), self.blocks, N_PROMPT, rows)
            self._exact = rows
        return self._exact
