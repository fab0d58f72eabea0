"""Which experts a pass uses, and when a position is run again: MoBiLE's decision, arXiv 2510.12357.

Pure policy over a narrow view of a sequence, so that the rule can be tested without an engine.
Little: at most ``little_k`` routed experts; big: all of the top-k. ``big-little`` has two ways to find the
important tokens. By confidence, MoBiLE's: a token is decoded little first; if the largest softmax probability
of that pass is below ``gamma``, the position is run again with all experts and its KV row overwritten. By the
model's importance head, ours: what it says before the pass decides between one big pass and one little.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.options import DEFAULT_GAMMA
from mobile_gguf.options.words import AUTO_MODE, BIG_LITTLE, CONFIDENCE, EXACT, HEAD, LITTLE, OFF

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..loss.auto import Auto, Spending
    from .costs import Traffic

# As the engine has it: 0 routed experts means all of the top-k.
ALL_EXPERTS = 0


class Pass(Enum):
    """The pass whose logits a token is sampled from."""

    BIG = "big"
    LITTLE = "little"
    FALLBACK = "fallback"


@dataclass(frozen=True)
class Policy:
    """The mode in effect; ``little_k`` routed experts in a little pass, ``gamma`` a probability.

    ``importance`` is HEAD or CONFIDENCE; above ``head_threshold``, a probability, the head
    has a token run big. ``loss`` are the rules for missing experts of generated tokens, None: all are read;
    ``prompt_loss`` those for a prompt's. Of a token that lacks experts the weights of the others are divided
    by the mass of its ``mass`` heaviest, 0: by their own. ``correction`` makes up for the experts that little
    tokens lack, None: nothing does. In mode auto tokens follow what an answer's
    ``spending`` chooses, of ``max_kld`` nats each. ``speculate`` says where drafts come from.
    """

    mode: str = EXACT
    gamma: float = DEFAULT_GAMMA
    little_k: int = 0
    importance: str = CONFIDENCE
    head_threshold: float = 0.5
    loss: LossRules | None = None
    prompt_loss: LossRules | None = None
    mass: int = 0
    correction: Correction | None = None
    max_kld: float = 0.0
    auto: Auto | None = field(default=None, compare=False)
    spending: Spending | None = field(default=None, compare=False)
    speculate: str = OFF

    def of_answer(self, n_prompt: int) -> Policy:
        """The policy of one answer to a prompt of so many tokens."""
        if self.auto is None:
            return self
        return replace(self, spending=self.auto.spend(self.max_kld, n_prompt))

    @property
    def may_lose(self) -> bool:
        """Whether rules for missing experts may be in force."""
        return self.loss is not None or self.prompt_loss is not None or self.mode == AUTO_MODE

    @property
    def uses_head(self) -> bool:
        """Whether the head is asked before each token."""
        return self.mode == BIG_LITTLE and self.importance == HEAD

    @property
    def is_the_same_for_all(self) -> bool:
        """Whether all tokens are run alike, whatever passes before them gave: then several may be at once."""
        return self.mode in (EXACT, LITTLE) and self.loss is None

    @property
    def always_big(self) -> bool:
        """Whether every kept KV row comes from a big pass that lost nothing: no probability is above 1."""
        if self.prompt_loss is not None or self.mode == AUTO_MODE:
            return False
        if self.loss is not None and self.mode != BIG_LITTLE:
            return False
        if self.uses_head:
            return self.head_threshold <= 0
        return self.mode == EXACT or (self.mode == BIG_LITTLE and self.gamma > 1)


class Steps(Protocol):
    """What a step needs of a sequence."""

    def use_experts(self, k: int) -> None:
        """Use at most ``k`` routed experts from the next pass on; ALL_EXPERTS: the top-k."""
        ...

    def use_loss(self, rules: LossRules | None) -> None:
        """From the next pass on missing experts follow ``rules``; None: all are read."""
        ...

    def use_mass(self, n: int) -> None:
        """What kept weights are divided by from the next pass on: the mass of ``n`` experts, 0: their own."""
        ...

    def use_correction(self, correction: Correction | None) -> None:
        """From the next pass on tokens with its number of experts are corrected; None: none are."""
        ...

    def forward(self, tokens: list[int]) -> None:
        """Run tokens at the next positions, overwriting whatever was there."""
        ...

    def forward_drafted(self, tokens: list[int], n_said: int) -> None:
        """Run tokens at the next positions, of which the first ``n_said`` are the text's.

        The pass over the last of those gives the logits after it and after each token behind it.
        """
        ...

    def step_back(self) -> None:
        """Forget the last position, so that the next pass overwrites it."""
        ...

    def prefetch_masked(self) -> None:
        """Hint that the experts the last little pass left out are wanted."""
        ...

    def last_logits(self) -> Any:
        """Logits [n_vocab] of the last pass."""
        ...

    def traffic(self) -> Traffic:
        """What was counted so far."""
        ...

    def head_probability(self, token: int) -> float | None:
        """The importance head's probability for ``token``, not run yet; None without a state to ask about."""
        ...


def default_little_k(n_expert_used: int) -> int:
    """Half of the top-k, the paper's choice, at least one; 0 for a model without experts."""
    return max(min(1, n_expert_used), n_expert_used // 2)


def max_probability(logits: npt.NDArray[Any]) -> float:
    """The largest softmax probability of ``logits`` [n_vocab]: 1 / sum exp(logit - max), never above 1.

    Exponentials in the logits' own precision, eight times faster in float32, their sum in float64.
    """
    import numpy as np

    return 1.0 / float(np.exp(logits - logits.max()).sum(dtype=np.float64))


def is_important(probability: float, gamma: float) -> bool:
    """Whether a token whose little pass reached ``probability`` is run again with all experts.

    gamma 0: never; gamma above 1: always. Logits that are not numbers count as important.
    """
    if probability != probability:
        return gamma > 0
    return probability < gamma


def is_important_by_head(probability: float | None, threshold: float) -> bool:
    """Whether a token to which the head gives ``probability`` is run big at once.

    Threshold 0: always; 1: never. Without a probability, or with one that is not a number, it is.
    """
    return threshold <= 0 or probability is None or not probability <= threshold


def decode_prompt(steps: Steps, tokens: list[int], rules: LossRules | None = None) -> Pass:
    """Run prompt tokens; a prompt is always big, and loses nothing but by ``rules``."""
    steps.use_loss(rules)
    steps.use_experts(ALL_EXPERTS)
    steps.forward(tokens)
    return Pass.BIG


def decode_token(steps: Steps, token: int, policy: Policy) -> Pass:
    """Run one generated token as ``policy`` has it; returns the pass that its logits come from.

    What is big because it is important loses nothing.
    """
    steps.use_mass(policy.mass)
    steps.use_correction(policy.correction)
    if policy.spending is not None:
        return policy.spending.run_token(steps, token)
    if policy.mode == EXACT:
        steps.use_loss(policy.loss)
        steps.use_experts(ALL_EXPERTS)
        steps.forward([token])
        return Pass.BIG
    if policy.uses_head and is_important_by_head(steps.head_probability(token), policy.head_threshold):
        return decode_prompt(steps, [token])
    steps.use_loss(policy.loss)
    steps.use_experts(policy.little_k)
    steps.forward([token])
    if policy.mode == LITTLE or policy.uses_head:
        return Pass.LITTLE
    if not is_important(max_probability(steps.last_logits()), policy.gamma):
        return Pass.LITTLE
    steps.prefetch_masked()
    steps.step_back()
    steps.use_loss(None)
    steps.use_experts(ALL_EXPERTS)
    steps.forward([token])
    return Pass.FALLBACK


def decode_drafted(steps: Steps, said: list[int], draft: list[int], policy: Policy) -> Pass:
    """Run generated tokens and those that were drafted behind them, each as ``policy`` has a token."""
    steps.use_mass(policy.mass)
    steps.use_correction(policy.correction)
    steps.use_loss(None)
    is_little = policy.mode == LITTLE
    steps.use_experts(policy.little_k if is_little else ALL_EXPERTS)
    steps.forward_drafted([*said, *draft], len(said))
    return Pass.LITTLE if is_little else Pass.BIG
