"""The models on this machine, in the data directory and the Hugging Face cache, and how each fits it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import format_bytes

from .cache import PARTIAL_SUFFIX, Snapshot, all_snapshots, repositories, repository_folder
from .facts import FactsCache
from .pull import pulled_reference
from .reference import Reference
from .resolve import DEMO, demo_file, local_models, model_name
from .variants import RemoteFile, Variant, find_variants, models_among

if TYPE_CHECKING:
    from mobile_gguf.memory.fit import Fit
    from mobile_gguf.plan.known import Here
    from mobile_gguf.plan.speed import Prediction

MODELS, CACHE = "models", "hub"  # where a model lies: the data directory, the Hugging Face cache


@dataclass(frozen=True)
class ModelEntry:
    """A model as ``list`` shows it; ``problem`` says why it cannot be run, ``info`` is None then.

    ``fit`` is where a run with default flags would put it now, None if it does not fit at all. ``speed`` is
    what the plan predicts of that run, None where the machine or its device was not measured. ``refusal``:
    why it does not fit.
    """

    name: str
    where: str
    path: Path | None = None
    n_bytes: int | None = None
    info: GgufInfo | None = None
    problem: str = ""
    fit: Fit | None = None
    speed: Prediction | None = None
    refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The object of ``list --json``; bytes, shares from 0 to 1."""
        info = self.info
        return {
            "name": self.name,
            "where": self.where,
            "path": str(self.path) if self.path is not None else None,
            "bytes": self.n_bytes,
            "problem": self.problem or None,
            "architecture": info.architecture if info else None,
            "quantization": info.quantization if info else None,
            "layout": info.layout if info and info.is_moe else None,
            "n_expert": info.n_expert if info else None,
            "n_expert_used": info.n_expert_used if info else None,
            "expert_bytes": info.expert_bytes if info else None,
            "dense_bytes": info.dense_bytes if info else None,
            "fit": _fit_facts(self.fit) if info and info.is_moe else None,
            "predicted": self.speed.to_dict() if self.speed else None,
        }


def _fit_facts(fit: Fit | None) -> dict[str, Any]:
    on_device = fit is not None and fit.devices
    return {
        "ram_expert_share": round(fit.ram_share, 4) if fit else 0.0,
        "vram_expert_share": round(fit.vram_share, 4) if fit and on_device else None,
        "devices": [device.name for device in fit.devices] if fit else [],
    }


def list_models(here: Here | None = None) -> list[ModelEntry]:
    """The demo, the models of the data directory by name, then those of the Hugging Face cache.

    Only headers are read, once for each file. A file that cannot be run is listed with the reason. ``here``
    is the machine that they are to fit on; without it ``fit`` and ``speed`` are left out.
    """
    facts = FactsCache()
    found = [_demo(facts, here)]
    for path in local_models():
        files = (path, *(part for part in _parts(path) if part != path))
        found.append(_described(model_name(path), MODELS, path, files, facts, here))
    for snapshot, variant, variants in pulled_models():
        name = str(pulled_reference(snapshot, variant, variants))
        files = tuple(snapshot.folder / file.path for file in variant.files)
        found.append(_described(name, CACHE, files[0], files, facts, here))
    found += [
        ModelEntry(
            str(Reference(repo)), CACHE, folder, n_bytes, problem="download not finished: pull it again"
        )
        for repo, folder, n_bytes in unfinished()
    ]
    facts.save()
    return found


def pulled_models() -> list[tuple[Snapshot, Variant, list[Variant]]]:
    """Every GGUF model in the Hugging Face cache, with the others of its snapshot.

    Of the same file in several revisions only the one that a name (``main``) leads to, or the newest.
    """
    found: dict[Path, tuple[Snapshot, Variant, list[Variant]]] = {}
    in_order = sorted(
        all_snapshots(),
        key=lambda s: ("main" in s.refs, bool(s.refs), s.folder.stat().st_mtime),
        reverse=True,
    )
    for snapshot in in_order:
        variants = snapshot.variants()
        for variant in models_among(variants):
            found.setdefault((snapshot.folder / variant.path).resolve(), (snapshot, variant, variants))
    return sorted(found.values(), key=lambda item: (item[0].repo.lower(), item[1].path, item[0].commit))


def unfinished() -> list[tuple[str, Path, int]]:
    """Repositories with downloads that were stopped: name, folder, bytes of the partial files."""
    found = []
    for repo in repositories():
        blobs = repository_folder(repo) / "blobs"
        sizes = [path.stat().st_size for path in blobs.glob(f"*{PARTIAL_SUFFIX}") if path.is_file()]
        if sizes:
            found.append((repo, blobs.parent, sum(sizes)))
    return found


def _demo(facts: FactsCache, here: Here | None) -> ModelEntry:
    path = demo_file()
    if path is None:
        return ModelEntry(DEMO, MODELS, problem="not built yet: `mobile-gguf run demo` does it")
    return _described(DEMO, MODELS, path, (path,), facts, here)


def _described(
    name: str,
    where: str,
    path: Path,
    files: tuple[Path, ...],
    facts: FactsCache,
    here: Here | None,
) -> ModelEntry:
    info, problem = facts.read(path, files)
    n_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if info is None:
        return ModelEntry(name, where, path, n_bytes, problem=f"broken: {problem}")
    entry = ModelEntry(name, where, path, info.file_bytes, info)
    return entry if here is None else _placed(entry, info, here)


def _placed(entry: ModelEntry, info: GgufInfo, here: Here) -> ModelEntry:
    try:
        fit = here.fit(info)
    except UsageError as error:
        return replace(entry, refusal=str(error))
    return replace(entry, fit=fit, speed=here.speed(info, fit) if info.is_moe else None)


def _parts(path: Path) -> list[Path]:
    """The files of a model of the data directory; of a split one all that are there."""
    beside = [RemoteFile(other.name, 0) for other in path.parent.glob("*.gguf")]
    for variant in find_variants(beside):
        if any(file.path == path.name for file in variant.files):
            return [path.with_name(file.path) for file in variant.files]
    return [path]


def fit_text(entry: ModelEntry) -> str:
    """``all in RAM``, ``43% in VRAM, all in RAM``, ``all in VRAM``, ``too big``; of a dense model, where."""
    if entry.info is None:
        return "-"
    fit = entry.fit
    if not entry.info.is_moe:
        return "dense, in VRAM" if fit is not None and fit.devices else "dense"
    return "too big" if fit is None else shares_text(fit)


def shares_text(fit: Fit) -> str:
    """Where the experts of a model that fits are."""
    if fit.devices and fit.vram_share >= 1:
        return "all in VRAM"
    in_ram = f"{_share(fit.ram_share)} in RAM"
    return f"{_share(fit.vram_share)} in VRAM, {in_ram}" if fit.devices else in_ram


def _share(share: float) -> str:
    """Percent; not 100 unless it is all, not 0 if it is something."""
    return "all" if share >= 1 else f"{min(99, max(1, round(100 * share)))}%"


def size_text(entry: ModelEntry) -> str:
    return format_bytes(entry.n_bytes) if entry.n_bytes is not None else "-"
