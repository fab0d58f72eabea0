"""How a model is loaded: every option declared once, with llama.cpp's flags, type, default, range and help.

The Python API takes the names as keywords; ``flags.py`` makes the command line's flags and the
chat's ``/set`` of the same declarations. What an answer may be asked as well is in ``shared``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from mobile_gguf.sizes import AUTO, Size, parse_bytes, parse_bytes_or_off, parse_size, parse_size_or_off

from . import shared
from .opt import Checked, Opt
from .source import parse_source
from .tokens import MAX_TOKENS, parse_parallel, parse_switch, parse_tokens_or_auto
from .words import AUTO as AUTO_SWITCH
from .words import (
    AUTO_UBATCH,
    CACHE_TYPES,
    DEFAULT_EVICTION,
    DEFAULT_IO_THREADS,
    EVICTION,
    F16,
    IO,
    MISS,
    OFF,
    ON,
    PLACEMENTS,
    PREFETCH,
    SPLIT,
)

# GGML_MAX_N_THREADS of llama.cpp, which ends the process with more.
MAX_THREADS = 512
_RAM_BUDGET = Opt(
    "--ram-budget",
    read=parse_size,
    help="memory for experts: 512MiB, 2G, 40% of them, or auto",
)
_threads = partial(Opt, read=int, low=1, high=MAX_THREADS)


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Checked):
    """How a model is loaded."""

    ram_budget: Annotated[Size, _RAM_BUDGET] = AUTO
    vram_budget: Annotated[
        Size | Literal["off"],
        Opt(
            "--vram-budget",
            read=parse_size_or_off,
            metavar="SIZE",
            help="device memory for experts: 3GiB, 25% of them, auto: what is free, or off: no device",
        ),
    ] = AUTO
    miss: Annotated[
        str,
        Opt(
            "--miss",
            choices=MISS,
            help="an expert that the device lacks: fetch it, compute on the cpu, or the cheaper",
        ),
    ] = "auto"
    placement: Annotated[
        str,
        Opt(
            "--placement",
            choices=PLACEMENTS,
            help="experts on the device: a cache of all, whole layers, or the one measured faster",
        ),
    ] = "auto"
    rpc: Annotated[
        str, Opt("--rpc", metavar="SERVERS", help="llama.cpp RPC servers as devices: HOST:PORT[,HOST:PORT]")
    ] = ""
    prefetch: Annotated[
        str,
        Opt("--prefetch", choices=PREFETCH, help="move experts before they are asked for: where it helps"),
    ] = "auto"
    warm: Annotated[
        str,
        Opt(
            "--warm",
            choices=(ON, OFF),
            help="read the experts that were used most last time while the disk is idle",
        ),
    ] = ON
    mode: Annotated[str, shared.MODE] = "exact"
    gamma: Annotated[float, shared.GAMMA] = shared.DEFAULT_GAMMA
    importance: Annotated[str, shared.IMPORTANCE] = "auto"
    head_threshold: Annotated[float | None, shared.HEAD_THRESHOLD] = None
    little_k: Annotated[int | None, shared.LITTLE_K] = None
    little_correction: Annotated[str, shared.LITTLE_CORRECTION] = OFF
    drop: Annotated[float, shared.DROP] = 0.0
    little_on_miss: Annotated[str, shared.LITTLE_ON_MISS] = OFF
    substitute: Annotated[str, shared.SUBSTITUTE] = OFF
    max_kld: Annotated[float | None, shared.MAX_KLD] = None
    prompt_drop: Annotated[float, shared.PROMPT_DROP] = 0.0
    partial: Annotated[float, shared.PARTIAL] = 0.0
    speculate: Annotated[
        str,
        Opt("--speculate", read=parse_source, metavar="SOURCE", help=shared.SPECULATE_HELP % "=MODEL"),
    ] = AUTO_SWITCH
    n_ctx: Annotated[
        int | None,
        Opt(
            *("-c", "--ctx-size"),
            read=int,
            low=0,
            high=MAX_TOKENS,
            unset=AUTO_SWITCH,
            help="context, 0: the model's; auto: as much of that as fits beside the experts (default)",
        ),
    ] = None
    n_batch: Annotated[
        int | None,
        Opt(
            *("-b", "--batch-size"),
            read=int,
            low=1,
            high=MAX_TOKENS,
            help="prompt tokens per call (default: 512, or as many as are computed at once)",
        ),
    ] = None
    n_ubatch: Annotated[
        int | Literal["auto"],
        Opt(
            *("-ub", "--ubatch-size"),
            read=parse_tokens_or_auto,
            metavar="N",
            help="prompt tokens computed at once; auto: 512, more where experts are streamed and it pays",
        ),
    ] = AUTO_UBATCH
    threads: Annotated[
        int | None, _threads("-t", "--threads", help="threads that generate (default: the cores)")
    ] = None
    threads_batch: Annotated[
        int | None, _threads("-tb", "--threads-batch", help="... and that process prompts")
    ] = None
    threads_auto: Annotated[
        str,
        Opt(
            "--threads-auto",
            choices=(ON, OFF),
            help="generate with fewer threads while others want the processors",
        ),
    ] = ON
    io_threads: Annotated[
        int | None,
        Opt(
            "--io-threads",
            read=int,
            low=1,
            high=64,
            help=f"threads that read experts (default: {DEFAULT_IO_THREADS})",
        ),
    ] = None
    io: Annotated[str, Opt("--io", choices=IO, help="how experts are read from the file")] = "auto"
    eviction: Annotated[str, Opt("--eviction", choices=EVICTION, help="which expert leaves memory first")] = (
        DEFAULT_EVICTION
    )
    split: Annotated[
        str,
        Opt("--split", choices=SPLIT, help="keep leading segments of experts, where the file has a plan"),
    ] = "auto"
    flash_attn: Annotated[
        bool | Literal["auto"],
        Opt(
            *("-fa", "--flash-attn"),
            read=parse_switch,
            bare=ON,
            metavar="{on,off,auto}",
            help="flash attention: smaller compute buffers; auto: where the type of values needs it",
        ),
    ] = AUTO_SWITCH
    cache_type_k: Annotated[
        str,
        Opt("-ctk", "--cache-type-k", choices=CACHE_TYPES, help="what the context's keys are kept as"),
    ] = F16
    cache_type_v: Annotated[
        str,
        Opt("-ctv", "--cache-type-v", choices=CACHE_TYPES, help="... and its values"),
    ] = F16
    memory: Annotated[
        Size,
        Opt(
            "--memory",
            read=parse_bytes,
            metavar="SIZE",
            help="memory of the whole process: weights, context, buffers, experts; auto: no promise",
        ),
    ] = AUTO
    prefix_cache: Annotated[
        Size | Literal["off"],
        Opt(
            "--prefix-cache",
            read=parse_bytes_or_off,
            metavar="SIZE",
            help="free memory for conversations that others put out of the context: auto (2 GiB), or off",
        ),
    ] = AUTO
    parallel: Annotated[
        int | Literal["auto"] | None,
        Opt(
            *("-np", "--parallel"),
            read=parse_parallel,
            metavar="N",
            help="answers of a server or a batch made at once, sharing the context; auto: as many as pay"
            " (default: 1, serve: 4)",
        ),
    ] = None
    deterministic: Annotated[
        bool,
        Opt(
            "--deterministic",
            is_flag=True,
            help="the same answer each time, with others and drafts as without: contexts, decodes and kernels"
            " of its own, and no expert comes by the clock (none ahead of need or while idle); slower",
        ),
    ] = False
    session_cache: Annotated[
        Size | Literal["off"],
        Opt(
            "--session-cache",
            read=parse_bytes_or_off,
            metavar="SIZE",
            help="disk for conversations that a later start continues: auto (2 GiB; in Python off), or off",
        ),
    ] = AUTO
    seed: Annotated[int | None, shared.SEED] = None
    verbose: Annotated[bool, Opt("-v", "--verbose", is_flag=True, help="show the engine's log")] = False

    @property
    def uses_flash_attention(self) -> bool:
        """Whether attention is computed so: where it was asked for, or llama.cpp needs it."""
        if self.flash_attn == AUTO_SWITCH:
            return self.cache_type_v != F16  # values in blocks cannot be transposed
        return bool(self.flash_attn)
