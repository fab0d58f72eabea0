"""``calibrate``: run a model over text, fit its head, price its settings, write it all into the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf import __version__
from mobile_gguf.api.model import Model, backend_of, load
from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.errors import MobileError, UsageError, install_hint
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.generate.passes.buddies import make_buddies
from mobile_gguf.generate.passes.decode import default_little_k
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.fit import asked_of, fit_model
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.options import LoadOptions
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.sizes import AUTO, OFF, Size

from ..engine_task import in_child
from ..gguf.file import GgufSource, update_gguf
from .checkpoint import Checkpoint
from .collect import collect
from .correction import Maps, fit_maps, ways_of
from .curves import Point, choose_default, make_points, make_settings, measure_block
from .head import SHARES, Fit, fit_head
from .imatrix_file import check_imatrix_target, write_imatrix
from .lockstep import Lockstep, sequences_kept
from .price import Prices, price_ladder
from .room import budget_beside
from .samples import Samples, collect_samples, join
from .statistics import Statistics
from .store import PREFIXES, statistics_metadata, statistics_tensors
from .text import BLOCK, Text, cut_blocks, held_out, read_text

DEFAULT_TOKENS = 16384
# Blocks whose passes are computed side by side.
_SIDE_BY_SIDE = 8


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to calibrate on (no ``text`` files: the built-in text) and where to write it.

    At most ``tokens`` are run; ``out`` None rewrites the model's file. ``kl`` is the divergence above which
    a token is important, None: so that a quarter of them are. ``correction`` asks for corrections of little
    tokens. ``curve_blocks`` bounds the held-out blocks
    that the curves are measured on, ``price_blocks`` the blocks that rungs are priced on, 0: none are.
    ``resume`` False forgets what a stopped run left. ``imatrix`` also gets an importance matrix for
    quantising.
    """

    text: tuple[Path, ...] = ()
    tokens: int = DEFAULT_TOKENS
    out: Path | None = None
    imatrix: Path | None = None
    kl: float | None = None
    threads: int | None = None
    ram_budget: Size = AUTO
    correction: bool = True
    curve_blocks: int = 8
    price_blocks: int = 6
    resume: bool = True


@dataclass(frozen=True)
class Calibration:
    """What was measured; ``path`` is the file that holds it now.

    ``default`` is the setting chosen for ``mode="big-little"``; ``within`` says whether its perplexity is
    within 1% of big's. ``replaced`` says that the file had been calibrated before.
    """

    path: Path
    text: Text
    n_tokens: int
    fit: Fit
    points: list[Point]
    default: Point
    within: bool
    replaced: bool
    prices: Prices | None = None
    maps: Maps | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the same is stored in the file, but for its path."""
        return {"path": str(self.path)} | self.stored()

    def stored(self) -> dict[str, Any]:
        """What ``mobile.calibration.json`` holds."""
        fit, head = self.fit, self.fit.head
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "n_tokens": self.n_tokens,
            "head": {
                "kl": head.kl,
                "auc": head.auc,
                "auc_confidence": fit.auc_confidence,
                "positives": fit.positives,
                "n_fit": fit.n_fit,
                "n_held_out": fit.n_held_out,
                "strength": fit.strength,
                "thresholds": {str(share): value for share, value in fit.thresholds.items()},
            },
            "default": self.default.to_dict() | {"within_one_percent": self.within},
            "curves": [point.to_dict() for point in self.points],
            "prices": self.prices.to_dict() if self.prices is not None else None,
            "corrections": self.maps.to_dict() if self.maps is not None else None,
        }


def calibrate(path: Path, options: CalibrateOptions, progress: Progress = no_progress) -> Calibration:
    """Calibrate the model at ``path`` and write the results into its file, or into a copy at ``options.out``.

    A run that was stopped goes on where it was. The file is complete or as it was. Raises UsageError (a model
    without experts, too little text), EngineError, MobileError.
    """
    info = read_gguf_info(path)
    check_model(info, options.out)
    if options.imatrix is not None:
        check_imatrix_target(options.imatrix, [*info.files, *([options.out] if options.out else [])])
    text = read_text(options.text)
    replaced = any(name.startswith(keys.CALIBRATION) for name in info.metadata)
    checkpoint = Checkpoint(cache_dir() / "calibrate", _key(info, text, options))
    if not options.resume:
        checkpoint.clear()
    run = in_child(_measure, info, text, options, checkpoint, progress=progress)
    default, within = choose_default(run.points)
    head = dataclasses.replace(
        run.fit.head, threshold=default.setting.value, little_k=default.setting.little_k
    )
    result = Calibration(
        path=options.out or path,
        text=text,
        n_tokens=run.n_tokens,
        fit=dataclasses.replace(run.fit, head=head),
        points=run.points,
        default=default,
        within=within,
        replaced=replaced,
        prices=run.prices,
        maps=run.maps,
    )
    if options.imatrix is not None:
        datasets = [text.name]
        write_imatrix(options.imatrix, run.statistics.inputs, datasets=datasets, chunk_size=BLOCK)
    _write(path, options.out, result, run.statistics, progress)
    checkpoint.clear()
    return result


def check_model(info: GgufInfo, out: Path | None) -> None:
    """Refuse at once what would only fail later. Raises UsageError, MobileError, EngineError."""
    name = info.path.name
    if not info.is_moe:
        raise UsageError(f"{name} has no experts: there is nothing to calibrate")
    if info.n_expert_used <= 1:
        raise UsageError(f"{name} routes every token to one expert: there is nothing to leave out")
    if len(info.files) > 1 and out is None:
        raise UsageError(
            f"{name} is split into {len(info.files)} files: give --out FILE for one that holds all"
        )
    folder = (out or info.path).parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write to")
    target = out if out is not None and out.exists() else (info.path if out is None else folder)
    if not os.access(target, os.W_OK) or not os.access(folder, os.W_OK):
        raise MobileError(f"{target} cannot be written: give --out FILE elsewhere, or change its permissions")
    if find_engine() is None:
        raise needs_engine("calibration")
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise MobileError(f"calibration needs scikit-learn: {install_hint('calibrate')}") from None


def _key(info: GgufInfo, text: Text, options: CalibrateOptions) -> dict[str, Any]:
    # All that the measurements depend on; how many threads compute them is not part of it.
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in info.files]
    return {
        "version": __version__,
        "files": files,
        "text": text.sha256,
        "tokens": options.tokens,
        "kl": options.kl,
        "correction": options.correction,
        "curve_blocks": options.curve_blocks,
        "price_blocks": options.price_blocks,
    }


@dataclass(frozen=True)
class _Measured:
    """What the engine's process hands back."""

    n_tokens: int
    fit: Fit
    points: list[Point]
    statistics: Statistics
    prices: Prices | None
    maps: Maps | None


def _measure(
    info: GgufInfo, text: Text, options: CalibrateOptions, checkpoint: Checkpoint, progress: Progress
) -> _Measured:
    run = _Run(info, text, options, checkpoint, progress)
    with GgufSource.open(info.path) as source:
        run.measure(source)
    return _Measured(sum(map(len, run.blocks)), run.fit, run.points, run.statistics, run.prices, run.maps)


class _Run:
    """The measurement, phase by phase; what is done is in the checkpoint at once."""

    fit: Fit
    points: list[Point]
    statistics: Statistics
    prices: Prices | None = None
    maps: Maps | None = None

    def __init__(
        self,
        info: GgufInfo,
        text: Text,
        options: CalibrateOptions,
        checkpoint: Checkpoint,
        progress: Progress,
    ) -> None:
        self.info = info
        self.text = text
        self.options = options
        self.checkpoint = checkpoint
        self.progress = progress
        self.blocks: list[list[int]] = []
        self.little_k = default_little_k(info.n_expert_used)
        self.threads = options.threads or default_threads()[1]

    def measure(self, source: GgufSource) -> None:
        with self._load() as model:
            start = model.tokenize("", add_bos=True)
            self.blocks = cut_blocks(
                self.text, lambda part: model.tokenize(part, special=False), start, self.options.tokens
            )
            samples = self._samples(model)
            self.progress("fitting the importance head", 0.0)
            outside = np.isin(samples.block, held_out(len(self.blocks)))
            self.fit = fit_head(
                samples.take(~outside),
                samples.take(outside),
                source,
                self.info.n_vocab,
                little_k=self.little_k,
                kl=self.options.kl,
            )
            self.points = self._curves(model, self.fit.head)
        chosen, _ = choose_default(self.points)
        ks = (self.little_k, chosen.setting.little_k)
        ways = ways_of(self.info.n_expert_used, ks) if self.options.correction else []
        self.statistics = collect(
            self.info.path,
            self.blocks,
            ram_budget=self.options.ram_budget,
            threads=self.options.threads,
            inputs=self.options.imatrix is not None,
            ways=ways,
            progress=self.progress,
        )
        if ways:
            self.maps = fit_maps(self.info, ways, self.statistics.little)
        if self.options.price_blocks > 0:
            self.prices = self._prices()

    def _prices(self) -> Prices:
        """What rungs cost, on text that the head was not fitted on as far as there is any."""
        outside = held_out(len(self.blocks))
        numbers = [*outside, *(i for i in range(len(self.blocks)) if i not in outside)]
        chosen = sorted(numbers[: self.options.price_blocks])
        ranked = self.statistics.buddies
        own = LoadOptions(
            n_ctx=BLOCK, n_batch=1, n_ubatch=1, ram_budget=self.options.ram_budget, vram_budget=OFF
        )
        fit = fit_model(self.info, asked_of(self.info, own), read_memory())
        return price_ladder(
            self.info,
            [self.blocks[i] for i in chosen],
            head=self.fit.head,
            thresholds=self.fit.thresholds,
            buddies=make_buddies(self.info, ranked.expert, ranked.share, self.statistics.entropy),
            corrections=self.maps.corrections(self.info) if self.maps is not None else {},
            most_bytes=fit.ram_budget_bytes,
            threads=self.threads,
            checkpoint=self.checkpoint,
            progress=self.progress,
        )

    def _load(self) -> Model:
        # The context of its own stays empty; what the sequences need instead is left to them.
        own: dict[str, Any] = {"n_ctx": BLOCK, "n_batch": BLOCK, "n_ubatch": BLOCK, "threads": self.threads}
        budget = self.options.ram_budget
        if budget.is_auto:
            n_settings = len(make_settings(self.info.n_expert_used, dict.fromkeys(SHARES, 0.0)))
            n_seq = max(sequences_kept(_SIDE_BY_SIDE, has_copies=True), n_settings)
            counted = LoadOptions(**own | {"n_ctx": (1 + n_seq) * BLOCK, "vram_budget": OFF})
            # a state that does not grow with the context is every sequence's own
            budget = budget_beside(self.info, counted, n_seq * self.info.caches.state_bytes)
        return load(self.info.path, ram_budget=budget, **own)

    def _samples(self, model: Model) -> Samples:
        numbers = list(range(len(self.blocks)))
        groups = [numbers[i : i + _SIDE_BY_SIDE] for i in range(0, len(numbers), _SIDE_BY_SIDE)]
        parts = []
        with self._lockstep(model, _SIDE_BY_SIDE, twice=True) as lockstep:
            for i, group in enumerate(groups):
                self.progress("big and little passes", i / len(groups))

                def make(group: list[int] = group) -> dict[str, npt.NDArray[Any]]:
                    blocks = [self.blocks[number] for number in group]
                    return collect_samples(lockstep, blocks, group, self.little_k).arrays()

                parts.append(Samples(**self.checkpoint.get(f"samples-{i:05}", make)))
        self.progress("big and little passes", 1.0)
        return join(parts)

    def _curves(self, model: Model, head: Head) -> list[Point]:
        settings = make_settings(
            self.info.n_expert_used,
            self.fit.thresholds,
            with_confidence=backend_of(model).can_step_back,
        )
        chosen = held_out(len(self.blocks))[: self.options.curve_blocks]
        # With other settings, or another head, other results.
        series = hashlib.sha256(repr((settings, head.bias)).encode()).hexdigest()[:8]
        measured = []
        with self._lockstep(model, len(settings)) as lockstep:
            for i, number in enumerate(chosen):
                self.progress("trade-off curves", i / len(chosen))

                def make(number: int = number) -> dict[str, npt.NDArray[Any]]:
                    tokens = self.blocks[number]
                    return {"columns": measure_block(lockstep, self.info, tokens, settings, head)}

                measured.append(self.checkpoint.get(f"curves-{series}-{i:05}", make)["columns"])
        self.progress("trade-off curves", 1.0)
        return make_points(settings, measured)

    def _lockstep(self, model: Model, n_seq: int, *, twice: bool = False) -> Lockstep:
        n_ctx = len(self.blocks[0])
        return Lockstep(backend_of(model), n_seq=n_seq, n_ctx=n_ctx, threads=self.threads, twice=twice)


def _write(
    path: Path, out: Path | None, result: Calibration, statistics: Statistics, progress: Progress
) -> None:
    head = result.fit.head
    update_gguf(
        path,
        set={
            keys.HEAD_BIAS: head.bias,
            keys.HEAD_THRESHOLD: head.threshold,
            keys.HEAD_THRESHOLDS: json.dumps(result.stored()["head"]["thresholds"]),
            keys.HEAD_LITTLE_K: head.little_k,
            keys.HEAD_KL: head.kl,
            keys.HEAD_AUC: head.auc,
            keys.CALIBRATION_TEXT: result.text.name,
            keys.CALIBRATION_TEXT_SHA256: result.text.sha256,
            keys.CALIBRATION_N_TOKENS: result.n_tokens,
            keys.CALIBRATION_JSON: json.dumps(result.stored()),
        }
        | _listed(result.prices)
        | (result.maps.metadata() if result.maps is not None else {})
        | statistics_metadata(statistics),
        drop=(keys.HEAD, keys.CALIBRATION, keys.CORRECTION, keys.LOSS, *PREFIXES),
        add_tensors={keys.HEAD_WEIGHT: head.weight, keys.HEAD_TOKEN_BIAS: head.token_bias}
        | (result.maps.tensors() if result.maps is not None else {})
        | statistics_tensors(statistics),
        out=out,
        progress=progress,
    )


def _listed(prices: Prices | None) -> dict[str, str]:
    """The metadata that mode auto reads."""
    if prices is None or prices.listed is None:
        return {}
    return {keys.LOSS_JSON: json.dumps(prices.listed.to_dict())}
