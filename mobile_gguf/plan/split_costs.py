"""What the configurator of splits must know of this machine: a pass that finds all, and an expert's reads."""

from __future__ import annotations

from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import stored_share
from mobile_gguf.options import LoadOptions
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.sizes import OFF

from .disk import disk_name
from .machine import read_measurements
from .measure import measure, steps_for
from .measure_prompts import PROMPTS
from .predict import Case, Unknown
from .split import Choice, Costs, configure
from .split_cache import Routes, Shape
from .workload import make_settings, read_workload


def measured_costs(
    info: GgufInfo, threads: int | None = None, progress: Progress = no_progress
) -> tuple[Costs, str]:
    """Measure what is not known yet, and make costs of it; also returns the eviction policy they are for.

    Calls the engine's kernels. Raises MobileError where the machine could not be measured.
    """
    workload = read_workload(info)
    settings = make_settings(info, LoadOptions(threads=threads, vram_budget=OFF), 0.5)
    measurements = read_measurements()
    steps = steps_for(info, workload, [settings.k], settings.threads, settings.io_threads, resident=False)
    # of prompts nothing is asked
    left_out = measure(measurements, [step for step in steps if step.phase != PROMPTS], progress)
    case = Case(info, workload, measurements, settings, disk_name(info.path), None, "value", 0)
    try:
        return Costs(case.host_pass(settings.k, resident=False), case.reads()), settings.eviction
    except Unknown:
        raise MobileError("this machine could not be measured: " + "; ".join(left_out)) from None


def choose_split(info: GgufInfo, routes: Routes, n_bytes: int, costs: Costs, eviction: str) -> Choice:
    """The split under which ``routes`` [n_tokens, n_layer, k] run fastest in ``n_bytes`` of host memory.

    Raises UsageError as ``configure`` does.
    """
    shape = Shape(routes.shape[1], info.n_expert, info.segments)
    capacity = int(stored_share(info, n_bytes) * shape.n_parts)
    expert_bytes = info.expert_bytes // max(1, info.n_layer_moe * info.n_expert)
    return configure(routes, shape, capacity, expert_bytes, costs, eviction=eviction)
