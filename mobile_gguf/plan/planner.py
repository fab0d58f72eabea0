"""The plan of a model: fit, predicted speeds by mode, and the command line that is suggested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mobile_gguf.engine.devices import Device
from mobile_gguf.flags import arguments
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import Asked, Fit, asked_of, host_demand
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.memory.pools import pool_min_bytes
from mobile_gguf.memory.promise import promised
from mobile_gguf.memory.split import split_line, split_of
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO_MODE, BIG_LITTLE, EXACT, LITTLE
from mobile_gguf.sizes import AUTO, OFF, Size, format_bytes, whole_mebibytes
from mobile_gguf.wording import name_lines, shell_command

from .block import Block, block_of
from .disk import disk_name
from .ggml import device_key
from .machine import Measurements, correct, lesson_for
from .more import OneMore, one_more_gib
from .predict import predict, predict_prefill
from .prompt import PromptPrediction, predict_prompts
from .refusal import plan_fit
from .speed import Prediction
from .workload import Settings, Workload, make_settings, read_hotness

# A lossy mode is suggested only where it is this much faster.
_WORTH = 1.2
# Memory is worth a word where it is this share of what there is.
_WORTH_SAYING = 0.05


@dataclass(frozen=True)
class Plan:
    """Everything ``mobile-gguf plan`` says."""

    info: GgufInfo
    fit: Fit
    predictions: tuple[Prediction, ...]  # by mode; empty if nothing was measured
    prefill_s: float | None  # that a first prompt waits for the disk
    command: str
    measured: str  # date, "" if nothing was
    lessons: dict[
        str, tuple[int, str]
    ]  # runs that corrected a mode's prediction, and of which mode they were
    n_bits: float = 0.0  # per weight of the file, 0: not known
    notes: tuple[str, ...] = ()
    prompts: tuple[
        PromptPrediction, ...
    ] = ()  # of a first prompt, by length; empty as above, and with devices
    one_more: OneMore | None = None  # of the host's memory; None with devices
    block: Block | None = None  # that drafts, if it is loaded

    def prediction(self, mode: str) -> Prediction | None:
        """The prediction of a mode."""
        return next((one for one in self.predictions if one.mode == mode), None)


def make_plan(
    info: GgufInfo,
    workload: Workload,
    measurements: Measurements,
    options: LoadOptions,
    *,
    devices: Sequence[Device] = (),
    memory: Memory | None = None,
    n_bits: float = 0.0,
    notes: Sequence[str] = (),
    reference: str = "",
    asked: Asked | None = None,
    loaded: GgufInfo | None = None,
) -> Plan:
    """Plan a model by its header, the memory there is and what was measured. Raises FitError.

    ``reference`` is the model's name in the command that is suggested; without it that is the path. ``asked``
    is what the options ask for, if that is known already. ``loaded`` is ``info`` with the model's MTP block,
    where it is loaded with it: speeds are those without drafts.
    """
    memory, loaded = memory or promised(options, read_memory()), loaded or info
    fit = plan_fit(loaded, asked or asked_of(info, options), memory, devices, n_bits)
    modes = (EXACT, BIG_LITTLE, LITTLE) if info.is_moe and info.n_expert_used > 1 else (EXACT,)
    if keys.LOSS_JSON in info.metadata:
        modes = (*modes, AUTO_MODE)
    found: list[Prediction] = []
    lessons: dict[str, tuple[int, str]] = {}
    hotness = read_hotness(info)
    for mode in modes:
        prediction, taught = predict_fit(info, workload, measurements, options, fit, mode, hotness=hotness)
        if prediction is not None:
            found.append(prediction)
            lessons[mode] = taught

    def speed(other: Fit) -> float | None:
        exact, _ = predict_fit(info, workload, measurements, options, other, EXACT, hotness=hotness)
        return None if exact is None else exact.predicted_tps

    settings = settings_of(info, options, fit, EXACT)
    prefill = predict_prefill(info, workload, measurements, settings, disk_name(info.path))
    return Plan(
        info=loaded,
        fit=fit,
        predictions=tuple(found),
        prefill_s=prefill,
        command=suggest(loaded, options, fit, found, reference),
        measured=measurements.date() if found else "",
        lessons=lessons,
        n_bits=n_bits,
        notes=(*fit.notes, *_advice(loaded, fit), *notes),
        prompts=predict_prompts(info, workload, measurements, settings, disk_name(info.path)),
        one_more=None if fit.devices else one_more_gib(loaded, fit, speed),
        block=block_of(info, loaded, fit),
    )


def _advice(info: GgufInfo, fit: Fit) -> list[str]:
    """What flash attention would leave for experts, where that is much."""
    if fit.asked.flash_attn or fit.devices or fit.ram_share >= 1 or not info.is_moe:
        return []
    now, then = fit.demand, host_demand(info, replace(fit.asked, flash_attn=True))
    saved = now.total_bytes - then.total_bytes
    if saved < _WORTH_SAYING * fit.memory.available_bytes:
        return []
    return [
        f"with --flash-attn buffers take {format_bytes(then.buffer_bytes)} instead of "
        f"{format_bytes(now.buffer_bytes)}: room for experts"
    ]


def predict_fit(
    info: GgufInfo,
    workload: Workload,
    measurements: Measurements,
    options: LoadOptions,
    fit: Fit,
    mode: str,
    *,
    n_tokens: int = 128,
    hotness: Sequence[Sequence[float]] | None = None,
    corrected: bool = True,
) -> tuple[Prediction | None, tuple[int, str]]:
    """A mode's speed, and how many earlier runs, of which mode, corrected it."""
    device = fit.devices[0].name if fit.devices else ""
    lesson, teacher = lesson_for(measurements, info, mode, device, fit.ram_share)
    settings = replace(settings_of(info, options, fit, mode, lesson.big_share), n_tokens=n_tokens)
    prediction = predict(info, workload, measurements, settings, disk_name(info.path), hotness)
    if prediction is None or not corrected:
        return prediction, (0, mode)
    return correct(prediction, lesson), (lesson.n_runs, teacher)


def settings_of(
    info: GgufInfo, options: LoadOptions, fit: Fit, mode: str, learnt: float | None = None
) -> Settings:
    """What a prediction for these options and this fit is for; ``learnt`` as in ``make_settings``."""
    settings = make_settings(
        info, options, fit.ram_share,
        n_ctx=fit.asked.n_ctx, n_ubatch=fit.asked.n_ubatch, learnt_share=learnt, mode=mode,
    )  # fmt: skip
    if fit.devices:
        return replace(
            settings,
            device=device_key(fit.devices[0].name, fit.devices[0].description),
            vram_share=fit.vram_share,
            miss=options.miss,
            placement=options.placement,
        )
    return settings


def suggest(
    info: GgufInfo, options: LoadOptions, fit: Fit, predictions: Sequence[Prediction], reference: str = ""
) -> str:
    """A command line to copy: budgets, context and micro-batch as planned, the mode as asked for or worth it,
    and every other option that was given."""
    planned: dict[str, Any] = {"n_ctx": fit.asked.n_ctx, "n_ubatch": fit.asked.n_ubatch}
    if info.is_moe:
        planned["ram_budget"] = _budget(
            fit.asked.ram, fit.ram_share, fit.ram_budget_bytes, info.budget_min_bytes
        )
        if fit.vram_budget_bytes:
            least = pool_min_bytes(info, fit.n_pools)
            planned["vram_budget"] = _budget(
                fit.asked.vram or AUTO, fit.vram_share, fit.vram_budget_bytes, least
            )
    if fit.notes and not fit.devices and not fit.asked.insists:
        planned["vram_budget"] = OFF  # the device that was left out here could be taken there
    by_mode = {one.mode: one.predicted_tps for one in predictions}
    head = keys.HEAD_THRESHOLD in info.metadata
    is_worth = by_mode.get(BIG_LITTLE, 0) >= _WORTH * by_mode.get(EXACT, float("inf"))
    if options.mode == EXACT and head and is_worth:
        planned["mode"] = BIG_LITTLE
    also = ("n_ctx", "n_ubatch")
    words = ["mobile-gguf", "run", reference or str(info.path), *arguments(replace(options, **planned), also)]
    return shell_command(words)


def _budget(asked: Size, share: float, n_bytes: int, least: int) -> Size:
    """A budget to ask for: shares stay shares, all is all, and what is rounded is not below the smallest."""
    if share >= 1:
        return Size(fraction=1.0)
    if asked.fraction is not None:
        return asked
    rounded = whole_mebibytes(n_bytes)
    return Size(n_bytes=rounded if rounded >= least else n_bytes)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan for JSON; bytes, seconds and tokens per second."""
    fit = plan.fit
    return {
        "model": str(plan.info.path),
        "fits": True,
        "n_ctx": fit.asked.n_ctx,
        "n_ubatch": fit.asked.n_ubatch,
        "parallel": fit.asked.sequences.n,
        "bits_per_weight": round(plan.n_bits, 2),
        "memory": {"available_bytes": fit.memory.available_bytes, "source": fit.memory.source},
        "split": split_of(fit) if fit.memory.promise is not None else None,
        "dense_bytes": fit.demand.dense_bytes,
        "kv_bytes": fit.demand.kv_bytes,
        "compute_bytes": fit.demand.compute_bytes,
        "idle_bytes": fit.demand.idle_bytes,
        "vocabulary_bytes": fit.demand.vocabulary_bytes,
        "mapped_bytes": plan.info.lazy_bytes,
        "expert_bytes": plan.info.expert_bytes,
        "mtp": None if plan.block is None else plan.block.to_dict(),
        "ram_budget_bytes": fit.ram_budget_bytes,
        "ram_share": round(fit.ram_share, 4),
        "devices": [_device_facts(device) for device in fit.devices],
        "vram_budget_bytes": fit.vram_budget_bytes,
        "vram_share": round(fit.vram_share, 4),
        "measured": plan.measured or None,
        "predictions": [one.to_dict() | _lesson_facts(plan, one.mode) for one in plan.predictions],
        "prefill_read_s": plan.prefill_s,
        "one_more_gib": None if plan.one_more is None else plan.one_more.to_dict(),
        "prompts": [one.to_dict() for one in plan.prompts],
        "command": plan.command,
        "notes": list(plan.notes),
    }


def _lesson_facts(plan: Plan, mode: str) -> dict[str, Any]:
    n_runs, teacher = plan.lessons.get(mode, (0, mode))
    return {"runs": n_runs, "runs_of": teacher if n_runs else None}


def _device_facts(device: Device) -> dict[str, Any]:
    return {"name": device.name, "free_bytes": device.free_bytes, "total_bytes": device.total_bytes}


def plan_lines(plan: Plan) -> list[str]:
    """The plan for people."""
    info, fit = plan.info, plan.fit
    rows = [
        ("model", f"{info.name}, {format_bytes(info.file_bytes)}, {info.quantization}"),
        ("memory", f"{format_bytes(fit.memory.available_bytes)} available ({fit.memory.source})"),
    ]
    for device in fit.devices:
        rows.append(("device", f"{device.name}: {format_bytes(device.free_bytes)} free"))
    if fit.memory.promise is not None:
        rows.append(("promised", split_line(fit).removeprefix("memory ")))
    where = fit.devices[0].name if fit.devices else "RAM"
    rest = fit.demand
    rows.append(("dense weights", f"{format_bytes(rest.dense_bytes)} in {where}"))
    if info.lazy_bytes:
        cached = f"{format_bytes(info.lazy_bytes)} read row by row, in memory only as page cache"
        rows.append(("tables on disk", cached))
    if info.mtp_bytes:
        idle = f"{format_bytes(info.mtp_bytes)} of blocks that predict several tokens at once (MTP)"
        rows.append(("not loaded", idle))
    if plan.block is not None:
        rows.append(("drafts", f"by the model's MTP block, counted here: {plan.block}"))
    context = f"{format_bytes(rest.kv_bytes)} KV, {format_bytes(rest.buffer_bytes)} buffers in {where}"
    size = f"{fit.asked.n_ctx} tokens{fit.asked.sequences}, micro-batches of {fit.asked.n_ubatch}"
    rows.append(("context", f"{size}: {context}"))
    if info.is_moe:
        if fit.devices:
            rows.append(
                (
                    "experts in slots",
                    f"{format_bytes(fit.vram_budget_bytes)} on {where}, {fit.vram_share:.0%}",
                )
            )
        held = (
            "all of them"
            if fit.ram_share >= 1
            else f"{fit.ram_share:.0%} of them, the rest read from the file"
        )
        rows.append(
            ("experts in RAM", f"{format_bytes(min(fit.ram_budget_bytes, info.budget_all_bytes))}, {held}")
        )
    for one in plan.predictions:
        n_runs, teacher = plan.lessons.get(one.mode, (0, one.mode))
        learnt = f", corrected by {n_runs} run{'s' if n_runs > 1 else ''}" if n_runs else ""
        if n_runs and teacher != one.mode:
            learnt += f" of {teacher}"
        band = f"{one.low:.3g} to {one.high:.3g}"
        rows.append((f"{one.mode}", f"{one.predicted_tps:.3g} tokens/s ({band}{learnt})"))
    if not plan.predictions:
        rows.append(("speed", "not measured"))
    for one in plan.prompts:
        speed = f"{one.predicted_tps:.3g} tokens/s ({one.low:.3g} to {one.high:.3g})"
        rows.append((f"prompt of {one.n_tokens}", f"{speed}, first token after {one.first_token_s:.2g} s"))
    if not plan.prompts and plan.prefill_s is not None:
        rows.append(("first prompt", f"at least {plan.prefill_s:.1f} s of reading"))
    if plan.one_more is not None:
        rows.append(("1 GiB more buys", str(plan.one_more)))
    lines = name_lines(rows, 18)
    lines += [f"note: {note}" for note in plan.notes]
    return [*lines, "", plan.command]
