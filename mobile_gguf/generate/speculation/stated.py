"""What passes take where no clock may say it: fixed figures, so that the same run makes the same passes.

Under ``--deterministic`` the length of drafts must not hang on how fast the machine is just now, for it says
which experts are in memory afterwards. How many experts passes want is counted as elsewhere: counts are the
same each time. In units of a single token's computation, with a share f of the experts in memory:

    c(n) = 1 + .6 (n - 1),    waits(n) = 4 (1 - f)^2 n^.92

The first is what kernels of single rows took (docs/speculation.md). The second is drawn through what a token
of a real trace waited for a disk at an eighth and a quarter in memory, three and two times what it computed;
n tokens that follow each other wait for little less than n single ones, whose experts a cache has as well.

What a drafted token takes goes by the bytes of the weights that it is computed with, in units of those of a
token of the model: of a smaller model all that a token goes through; of the model's own block a layer and
the output matrix, and the layer's experts are as likely in memory as others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import DRAFT, LITTLE, MTP, NGRAM

from .costs import Step, StepCosts, usual_cost

_WAIT, _READS = 4.0, 0.92
# What a drafted token takes in the same units, by source, where nothing is said of the files.
DRAFTING: Mapping[str, float] = {NGRAM: 0.0, LITTLE: 0.8, DRAFT: 0.2, MTP: 0.2}
_OTHERS = 0.2


def waits(n_tokens: int, share: float) -> float:
    """What a pass over so many tokens waits, with a share of the experts in memory."""
    return _WAIT * (1.0 - share) ** 2 * n_tokens**_READS


def drafting(source: str, known: Mapping[str, float]) -> float:
    """What a token takes that a source drafts, as it is ``known`` of the files."""
    return known.get(source, DRAFTING.get(source, _OTHERS))


def block_takes(info: GgufInfo, share: float) -> float:
    """What a token takes that the block for multi-token prediction drafts."""
    layer = _layers_bytes(info) / info.n_layer
    return (layer * (1.0 + waits(1, share)) + _output_bytes(info)) / token_bytes(info)


def model_takes(small: GgufInfo, large: GgufInfo) -> float:
    """What a token takes that a smaller model drafts, which lies in memory whole."""
    return token_bytes(small) / token_bytes(large)


def token_bytes(info: GgufInfo) -> float:
    """Bytes of the weights that a token goes through."""
    return _layers_bytes(info) + _output_bytes(info)


def _layers_bytes(info: GgufInfo) -> float:
    used = info.expert_bytes * info.n_expert_used / info.n_expert if info.is_moe else 0.0
    return info.dense_bytes - info.embedding_bytes - info.output_bytes + used


def _output_bytes(info: GgufInfo) -> int:
    return info.output_bytes or info.embedding_bytes


@dataclass
class StatedCosts(StepCosts):
    """Costs that nothing changes; ``share`` of the experts are in memory. Needs are counted."""

    share: float = 1.0

    @property
    def is_in_doubt(self) -> bool:
        return False

    def observe(self, step: Step) -> None:
        # what it took is left out: it would say when passes count as known
        super().observe(replace(step, seconds=usual_cost(step.n_tokens), waited=0.0, n_before=0))

    def seconds_of(self, n_tokens: int) -> float:
        """What a pass over so many tokens takes, in units of what a single token computes."""
        return usual_cost(n_tokens) + waits(n_tokens, self.share)
