"""The words of the options: what may be chosen, said once. The engine keeps its own numbers for them."""

from __future__ import annotations

from typing import Final

# how many experts a token uses; the last: as a budget of divergence has it
EXACT, LITTLE, BIG_LITTLE, AUTO_MODE = MODES = ("exact", "little", "big-little", "auto")

# what finds the important tokens of big-little; auto: the head if the model has one, else confidence
HEAD, CONFIDENCE = "head", "confidence"
IMPORTANCE = ("auto", HEAD, CONFIDENCE)

# which expert leaves memory first
EVICTION = ("lru", "moepic", "decay")
DEFAULT_EVICTION = "decay"

# what becomes of messages that the context has no room for: the oldest turns go, or an error says so; auto:
# they go in a chat that is going on
TRIM = "trim"
CONTEXT_FULL = ("auto", TRIM, "stop")

# how experts are read from the file
IO = ("auto", "direct", "buffered")

# what keys and values are kept as: f16, or in blocks of 32 with a scale each
F16, Q8_0, Q4_0 = CACHE_TYPES = ("f16", "q8_0", "q4_0")

# threads that read experts, as the engine has it
DEFAULT_IO_THREADS = 4

# how many tokens of a prompt are computed at once: as streaming experts costs
AUTO_UBATCH: Final = "auto"
AUTO_PARALLEL: Final = "auto"

# flash attention: where it is needed; and the context: what fits
AUTO: Final = "auto"

# where an expert is computed that the device lacks
MISS = ("auto", "fetch", "cpu")

# where experts are: on the host alone, in a cache of slots on a device, whole layers of them there
HOST, CACHE, LAYERS = "host", "cache", "layers"
PLACEMENTS = ("auto", CACHE, LAYERS)

# moving experts before they are asked for; auto: while it is measured to help
OFF, ON = "off", "on"
PREFETCH = ("auto", OFF, ON)

# where guesses of the next tokens come from that are then checked together: the text itself, the model's own
# little passes, its own block for multi-token prediction, a smaller model; auto: where it is measured to pay
NGRAM, MTP, DRAFT = "ngram", "mtp", "draft"
SPECULATE = (OFF, "auto", NGRAM, LITTLE, MTP, DRAFT)

# keeping leading segments of experts before others; auto: as the file's plan for the budget says
SPLIT = ("auto", OFF)
RAM = "RAM"  # the tier that a split is planned for

# what is computed in the place of a missing expert; by co-activation, by the router's probabilities, by its
# choice among scores that favour what is there
BUDDY, LIVE, PRIOR = "buddy", "live", "prior"
SUBSTITUTE = (OFF, BUDDY, LIVE, PRIOR)

# how the states of a text become one vector; a reranker's "rank" makes none
MEAN, LAST, CLS, RANK = "mean", "last", "cls", "rank"
POOLINGS = (MEAN, LAST, CLS)
