"""The models on this machine, in the data directory and the Hugging Face cache, and how each fits it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..budget import estimate_demand, plan_budget
from ..errors import BudgetError, MobileError
from ..gguf_info import GgufInfo
from ..loading import context_size
from ..memory import Memory, read_memory
from ..options import LoadOptions
from ..resolve import DEMO, demo_file, local_models
from ..sizes import AUTO, format_bytes
from .cache import PARTIAL_SUFFIX, Snapshot, all_snapshots, repositories, repository_folder
from .facts import FactsCache
from .pull import pulled_reference
from .reference import Reference
from .variants import RemoteFile, Variant, find_variants, models_among

MODELS, CACHE = "models", "hub"  # where a model lies: the data directory, the Hugging Face cache


@dataclass(frozen=True)
class ModelEntry:
    """A model as ``list`` shows it; ``problem`` says why it cannot be run, ``info`` is None then.

    ``ram_share``: of the experts, what ``--ram-budget auto`` would keep in memory now; 0 if the model does
    not fit at all. ``speed`` is what the plan predicts for this machine, None where it was not measured.
    """

    name: str
    where: str
    path: Path | None = None
    n_bytes: int | None = None
    info: GgufInfo | None = None
    problem: str = ""
    ram_share: float | None = None
    speed: dict[str, Any] | None = None

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
            "fit": None if self.ram_share is None else {"ram_expert_share": round(self.ram_share, 4)},
            "predicted": self.speed,
        }


def list_models() -> list[ModelEntry]:
    """The demo, the models of the data directory by name, then those of the Hugging Face cache.

    Only headers are read, once for each file. A file that cannot be run is listed with the reason.
    """
    facts, memory = FactsCache(), read_memory()
    found = [_demo(facts, memory)]
    for path in local_models():
        files = (path, *(part for part in _parts(path) if part != path))
        found.append(_described(path.stem, MODELS, path, files, facts, memory))
    for snapshot, variant, variants in pulled_models():
        name = str(pulled_reference(snapshot, variant, variants))
        files = tuple(snapshot.folder / file.path for file in variant.files)
        found.append(_described(name, CACHE, files[0], files, facts, memory))
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


def ram_share(info: GgufInfo, memory: Memory) -> float | None:
    """The share of the experts that ``--ram-budget auto`` keeps; None for a model without experts."""
    if not info.is_moe:
        return None
    options = LoadOptions()
    demand = estimate_demand(info, n_ctx=context_size(info, None), n_ubatch=options.n_ubatch)
    try:
        budget = plan_budget(AUTO, info, demand, memory).budget_bytes
    except BudgetError:
        return 0.0
    return min(1.0, budget / info.budget_all_bytes) if budget else 1.0


def _demo(facts: FactsCache, memory: Memory) -> ModelEntry:
    path = demo_file()
    if path is None:
        return ModelEntry(DEMO, MODELS, problem="not built yet: `mobile-gguf run demo` does it")
    return _described(DEMO, MODELS, path, (path,), facts, memory)


def _described(
    name: str,
    where: str,
    path: Path,
    files: tuple[Path, ...],
    facts: FactsCache,
    memory: Memory,
) -> ModelEntry:
    info, problem = facts.read(path, files)
    n_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if info is None:
        return ModelEntry(name, where, path, n_bytes, problem=f"broken: {problem}")
    speed = _predicted(info) if info.is_moe else None
    return ModelEntry(name, where, path, info.file_bytes, info, "", ram_share(info, memory), speed)


def _parts(path: Path) -> list[Path]:
    """The files of a model of the data directory; of a split one all that are there."""
    beside = [RemoteFile(other.name, 0) for other in path.parent.glob("*.gguf")]
    for variant in find_variants(beside):
        if any(file.path == path.name for file in variant.files):
            return [path.with_name(file.path) for file in variant.files]
    return [path]


def _predicted(info: GgufInfo) -> dict[str, Any] | None:
    """The speed by what ``mobile-gguf plan`` measured on this machine; None where it did not.

    The planner reads arrays: it is imported only where there is something to predict.
    """
    from ..plan import predict_cached

    try:
        found = predict_cached(info)
    except MobileError:
        return None
    return None if found is None else found.to_dict()


def fit_text(entry: ModelEntry) -> str:
    """``all in RAM``, ``43% in RAM``, ``too big``; a dense model by its size."""
    if entry.info is None:
        return "-"
    if entry.ram_share is None:
        return "dense"
    if entry.ram_share >= 1:
        return "all in RAM"
    return f"{entry.ram_share * 100:.0f}% in RAM" if entry.ram_share else "too big"


def size_text(entry: ModelEntry) -> str:
    return format_bytes(entry.n_bytes) if entry.n_bytes is not None else "-"
