"""How an answer is generated: its options, declared as those of loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from . import shared
from .bias import parse_bias, take_bias
from .opt import Checked, Opt, take_parsed, take_schema, take_texts
from .words import CONTEXT_FULL, SPECULATE

_MAX_INT32 = (1 << 31) - 1


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
    seed: Annotated[int | None, shared.SEED] = None
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
    mode: Annotated[str | None, shared.MODE] = None
    gamma: Annotated[float | None, shared.GAMMA] = None
    importance: Annotated[str | None, shared.IMPORTANCE] = None
    head_threshold: Annotated[float | None, shared.HEAD_THRESHOLD] = None
    little_k: Annotated[int | None, shared.LITTLE_K] = None
    little_correction: Annotated[str | None, shared.LITTLE_CORRECTION] = None
    drop: Annotated[float | None, shared.DROP] = None
    little_on_miss: Annotated[str | None, shared.LITTLE_ON_MISS] = None
    substitute: Annotated[str | None, shared.SUBSTITUTE] = None
    max_kld: Annotated[float | None, shared.MAX_KLD] = None
    prompt_drop: Annotated[float | None, shared.PROMPT_DROP] = None
    partial: Annotated[float | None, shared.PARTIAL] = None
    speculate: Annotated[
        str | None, Opt("--speculate", choices=SPECULATE, help=shared.SPECULATE_HELP % ", loaded with it")
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
