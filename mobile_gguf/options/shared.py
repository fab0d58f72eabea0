"""What a model and each of its answers may be asked, declared once for both, and which of that decides how
tokens are run."""

from __future__ import annotations

from . import words
from .opt import Opt

DEFAULT_GAMMA = 0.7
# Nats a token, of mode auto: a fifth of what a little pass of half the experts costs, or less.
DEFAULT_MAX_KLD = 0.02
# What decides how tokens are run, with fewer experts or several at once; may change from answer to answer.
POLICY_OPTIONS = (
    "mode",
    "gamma",
    "little_k",
    "little_correction",
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
MODE = Opt(
    "--mode",
    choices=words.MODES,
    help="experts per token: exact all, little fewer, big-little both, auto as --max-kld allows",
)
MAX_KLD = Opt(
    "--max-kld",
    read=float,
    low=0,
    high=10,
    implies={"mode": words.AUTO_MODE},
    help="mode auto: divergence from exact to stay within, nats a token "
    f"(default: {DEFAULT_MAX_KLD:g}); 0: exact",
)
# no probability is above 1: any number above it is "always", and one is enough
GAMMA = Opt("--gamma", read=float, low=0, high=2, help="big-little: run a token again below this probability")
IMPORTANCE = Opt(
    "--importance",
    choices=words.IMPORTANCE,
    help="big-little: what finds important tokens; auto: the head, if any",
)
HEAD_THRESHOLD = Opt(
    "--head-threshold",
    read=float,
    low=0,
    high=1,
    help="big-little: a token is big above this probability of the head (default: as calibrated)",
)
LITTLE_K = Opt(
    "--little-k",
    read=int,
    low=1,
    help="experts of a little token (default: half the top-k, or as calibrated)",
)
LITTLE_CORRECTION = Opt(
    "--little-correction",
    choices=(words.OFF, words.ON),
    help="little tokens: make up for the experts they lack by a calibrated map of each layer",
)
# more than the two heaviest have no weight of 4 times the mean beside them
DROP = Opt(
    "--drop",
    read=float,
    low=0,
    high=4,
    help="leave out a missing expert with less than so much of an even share of its token's weight",
)
LITTLE_ON_MISS = Opt(
    "--little-on-miss",
    choices=(words.OFF, words.ON),
    help="compute experts beyond little-k only if they are in memory",
)
SUBSTITUTE = Opt(
    "--substitute",
    choices=words.SUBSTITUTE,
    help="in the place of a missing expert: its buddy, the likeliest there, or favour those there",
)
PARTIAL = Opt(
    "--partial",
    read=float,
    low=0,
    high=1,
    help="compute a missing expert by its segments that are there, if at least this share of them is",
)
PROMPT_DROP = Opt(
    "--prompt-drop",
    read=float,
    low=0,
    high=1,
    help="prompts: leave out a missing expert with less than so much of its layer's weight, 0: none",
)
SPECULATE_HELP = (
    "guess tokens and check several in one pass: by the text itself (ngram), few experts (little), the "
    "model's block for it (mtp), or a smaller model (draft%s); auto: where it pays"
)
# The engine's seeds have 32 bits, of which all ones ask it to make one up: fold_seed of
# generate/request/request.py.
SEED = Opt(
    "-s", "--seed", read=int, low=-1, help="random seed, modulo 4294967295; -1: a new one for every answer"
)
