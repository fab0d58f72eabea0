"""Every option, declared once: its name, llama.cpp's flags, type, default, range and help.

The Python API takes the names as keywords; ``flags.py`` makes the command line's flags and the
chat's ``/set`` of the same declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from mobile_gguf.sizes import AUTO, Size, parse_bytes, parse_bytes_or_off, parse_size, parse_size_or_off

from .bias import parse_bias, take_bias
from .opt import Checked, Opt, take_parsed, take_schema, take_texts
from .source import parse_source
from .tokens import MAX_TOKENS, parse_parallel, parse_switch, parse_tokens_or_auto
from .words import AUTO as AUTO_SWITCH
from .words import (
    AUTO_MODE,
    AUTO_UBATCH,
    CACHE_TYPES,
    CONTEXT_FULL,
    DEFAULT_EVICTION,
    DEFAULT_IO_THREADS,
    EVICTION,
    F16,
    IMPORTANCE,
    IO,
    MISS,
    MODES,
    OFF,
    ON,
    PLACEMENTS,
    PREFETCH,
    SPECULATE,
    SPLIT,
    SUBSTITUTE,
)

DEFAULT_GAMMA = 0.7
# Nats a token, of mode auto: a fifth of what a little pass of half the experts costs, or less.
DEFAULT_MAX_KLD = 0.02
# GGML_MAX_N_THREADS of llama.cpp, which ends the process with more.
MAX_THREADS = 512
_MAX_INT32 = (1 << 31) - 1
# What decides how tokens are run, with fewer experts or several at once; may change from answer to answer.
POLICY_OPTIONS = (
    "mode",
    "gamma",
    "little_k",
    "importance",
    "head_threshold",
    "drop",
    "little_on_miss",
    "substitute",
    "max_kld",
    "prompt_drop",
    "partial",
    "speculate",
)

_RAM_BUDGET = Opt(
    "--ram-budget",
    read=parse_size,
    help="memory for experts: 512MiB, 2G, 40% of them, or auto",
)
_MODE = Opt(
    "--mode",
    choices=MODES,
    help="experts per token: exact all, little fewer, big-little both, auto as --max-kld allows",
)
_MAX_KLD = Opt(
    "--max-kld",
    read=float,
    low=0,
    high=10,
    implies={"mode": AUTO_MODE},
    help="mode auto: divergence from exact to stay within, nats a token "
    f"(default: {DEFAULT_MAX_KLD:g}); 0: exact",
)
# no probability is above 1: any number above it is "always", and one is enough
_GAMMA = Opt(
    "--gamma", read=float, low=0, high=2, help="big-little: run a token again below this probability"
)
_IMPORTANCE = Opt(
    "--importance", choices=IMPORTANCE, help="big-little: what finds important tokens; auto: the head, if any"
)
_HEAD_THRESHOLD = Opt(
    "--head-threshold",
    read=float,
    low=0,
    high=1,
    help="big-little: a token is big above this probability of the head (default: as calibrated)",
)
_LITTLE_K = Opt(
    "--little-k",
    read=int,
    low=1,
    help="experts of a little token (default: half the top-k, or as calibrated)",
)
# more than the two heaviest have no weight of 4 times the mean beside them
_DROP = Opt(
    "--drop",
    read=float,
    low=0,
    high=4,
    help="leave out a missing expert with less than so much of an even share of its token's weight",
)
_LITTLE_ON_MISS = Opt(
    "--little-on-miss",
    choices=(OFF, ON),
    help="compute experts beyond little-k only if they are in memory",
)
_SUBSTITUTE = Opt(
    "--substitute",
    choices=SUBSTITUTE,
    help="in the place of a missing expert: its buddy, the likeliest there, or favour those there",
)
_PARTIAL = Opt(
    "--partial",
    read=float,
    low=0,
    high=1,
    help="compute a missing expert by its segments that are there, if at least this share of them is",
)
_PROMPT_DROP = Opt(
    "--prompt-drop",
    read=float,
    low=0,
    high=1,
    help="prompts: leave out a missing expert with less than so much of its layer's weight, 0: none",
)
_SPECULATE_HELP = (
    "guess tokens and check several in one pass: by the text itself (ngram), few experts (little), the "
    "model's block for it (mtp), or a smaller model (draft%s); auto: where it pays"
)
_threads = partial(Opt, read=int, low=1, high=MAX_THREADS)
# The engine's seeds have 32 bits, of which all ones ask it to make one up: fold_seed of generate/request.py.
_SEED = Opt(
    "-s", "--seed", read=int, low=-1, help="random seed, modulo 4294967295; -1: a new one for every answer"
)


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
    mode: Annotated[str, _MODE] = "exact"
    gamma: Annotated[float, _GAMMA] = DEFAULT_GAMMA
    importance: Annotated[str, _IMPORTANCE] = "auto"
    head_threshold: Annotated[float | None, _HEAD_THRESHOLD] = None
    little_k: Annotated[int | None, _LITTLE_K] = None
    drop: Annotated[float, _DROP] = 0.0
    little_on_miss: Annotated[str, _LITTLE_ON_MISS] = OFF
    substitute: Annotated[str, _SUBSTITUTE] = OFF
    max_kld: Annotated[float | None, _MAX_KLD] = None
    prompt_drop: Annotated[float, _PROMPT_DROP] = 0.0
    partial: Annotated[float, _PARTIAL] = 0.0
    speculate: Annotated[
        str,
        Opt("--speculate", read=parse_source, metavar="SOURCE", help=_SPECULATE_HELP % "=MODEL"),
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
    seed: Annotated[int | None, _SEED] = None
    verbose: Annotated[bool, Opt("-v", "--verbose", is_flag=True, help="show the engine's log")] = False

    @property
    def uses_flash_attention(self) -> bool:
        """Whether attention is computed so: where it was asked for, or llama.cpp needs it."""
        if self.flash_attn == AUTO_SWITCH:
            return self.cache_type_v != F16  # values in blocks cannot be transposed
        return bool(self.flash_attn)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Checked):
    """How one answer is generated. None means as loaded for what LoadOptions has too."""

    max_tokens: Annotated[
        int | None,
        Opt(
            *("-n", "--n-predict", "--predict", "--max-tokens"),
            read=int,
            low=-1,
            help="tokens at most, -1: until the model ends or the context is full (default)",
        ),
    ] = None
    temperature: Annotated[
        float, Opt("--temp", "--temperature", read=float, low=0, help="0: always the likeliest token")
    ] = 0.8
    top_k: Annotated[
        int,
        Opt("--top-k", read=int, low=-1, high=_MAX_INT32, help="keep the k likeliest tokens, 0: all"),
    ] = 40
    top_p: Annotated[
        float, Opt("--top-p", read=float, low=0, high=1, help="keep the likeliest of this total probability")
    ] = 0.95
    min_p: Annotated[
        float, Opt("--min-p", read=float, low=0, high=1, help="keep tokens of this share of the likeliest")
    ] = 0.05
    typical_p: Annotated[
        float, Opt("--typical", "--typical-p", read=float, low=0, high=1, help="locally typical, 1: off")
    ] = 1.0
    repeat_penalty: Annotated[
        float, Opt("--repeat-penalty", read=float, low=0, help="penalise repeated tokens, 1: off")
    ] = 1.0
    presence_penalty: Annotated[
        float, Opt("--presence-penalty", read=float, low=-100, high=100, help="penalise tokens used, 0: off")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Opt("--frequency-penalty", read=float, low=-100, high=100, help="... by how often, 0: off")
    ] = 0.0
    logit_bias: Annotated[
        dict[int, float] | None,
        Opt(
            *("-l", "--logit-bias"),
            read=parse_bias,
            accept=take_parsed(take_bias),
            repeated=True,
            metavar="ID+BIAS",
            help="make a token likelier or, with -, rarer: 15043-100; repeatable",
        ),
    ] = None
    seed: Annotated[int | None, _SEED] = None
    stop: Annotated[
        tuple[str, ...] | None,
        Opt(
            "--stop",
            "-r",
            "--reverse-prompt",
            accept=take_texts,
            repeated=True,
            help="text that ends the answer; repeatable",
        ),
    ] = None
    grammar: Annotated[
        str | None, Opt("--grammar", file_flags=("--grammar-file",), help="GBNF grammar the answer follows")
    ] = None
    json_schema: Annotated[
        str | dict[str, Any] | None,
        Opt(
            *("-j", "--json-schema"),
            accept=take_schema,
            file_flags=("-jf", "--json-schema-file"),
            help="JSON schema the answer follows, {} for any JSON",
        ),
    ] = None
    mode: Annotated[str | None, _MODE] = None
    gamma: Annotated[float | None, _GAMMA] = None
    importance: Annotated[str | None, _IMPORTANCE] = None
    head_threshold: Annotated[float | None, _HEAD_THRESHOLD] = None
    little_k: Annotated[int | None, _LITTLE_K] = None
    drop: Annotated[float | None, _DROP] = None
    little_on_miss: Annotated[str | None, _LITTLE_ON_MISS] = None
    substitute: Annotated[str | None, _SUBSTITUTE] = None
    max_kld: Annotated[float | None, _MAX_KLD] = None
    prompt_drop: Annotated[float | None, _PROMPT_DROP] = None
    partial: Annotated[float | None, _PARTIAL] = None
    speculate: Annotated[
        str | None, Opt("--speculate", choices=SPECULATE, help=_SPECULATE_HELP % ", loaded with it")
    ] = None
    reasoning_budget: Annotated[
        int | None,
        Opt(
            "--reasoning-budget",
            read=int,
            low=-1,
            high=_MAX_INT32,
            help="tokens that a model may think, 0: it does not, -1: as many as it likes (default)",
        ),
    ] = None
    context_full: Annotated[
        str,
        Opt(
            "--context-full",
            choices=CONTEXT_FULL,
            help="messages beyond the context: leave out the oldest turns, or stop; auto: trim in chats",
        ),
    ] = "auto"
    cache_prompt: Annotated[
        bool, Opt("--no-cache-prompt", is_flag=True, help="compute the whole prompt, reuse no context")
    ] = True

    def sampling(self) -> dict[str, float]:
        """The numbers of the sampler chain, by llama-cpp-python's names."""
        return {
            "temp": float(self.temperature),
            "top_k": int(self.top_k),
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
            "typical_p": float(self.typical_p),
            "repeat_penalty": float(self.repeat_penalty),
            "presence_penalty": float(self.presence_penalty),
            "frequency_penalty": float(self.frequency_penalty),
        }
