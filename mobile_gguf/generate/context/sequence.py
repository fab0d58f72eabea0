"""One text in a context: the tokens whose rows are in memory, and how it grows by a prompt or a token.

What a row holds depends on the pass that wrote it, so a sequence knows which rows all experts wrote, and an
exact answer builds on no others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import EngineError, UsageError

from ..passes.costs import Costs, Traffic
from ..passes.decode import ALL_EXPERTS, Pass, Policy, decode_drafted, decode_prompt, decode_token
from ..sessions.prefix_cache import PrefixCache, common_length
from .cells import Cells
from .decoder import Decoder
from .prompt_pieces import prompt_pieces
from .wish import Wish

if TYPE_CHECKING:
    from ..speculation.drafting import Drafting

# The engine keeps this much more memory for logits where those of a whole prompt are asked for.
_LOGITS_BYTES = 16 << 20
# A prompt that is all in the context already is computed anew from here before its end.
_MIN_PROMPT = 2


class TokenSequence(Cells):
    """A decode.Steps of at most ``n_max`` tokens, whose ``scheduler`` decodes for all of its context.

    ``policy`` says which passes its tokens get; ``last_pass`` is the one that the logits at hand come from.
    ``prompt_evaluated`` counts the tokens of prompts that were computed, ``prompt_done`` is when the last
    prompt was (``time.perf_counter``). An answer may have ``n_wanted`` tokens, which ``drafting`` guesses,
    many of which may be those of its ``prediction``.
    While a prompt is computed ``should_stop`` is asked, ``on_prompt`` is told how many tokens are done, of
    how many, and ``on_logits`` a token's place and the logits after it.
    """

    def __init__(self, decoder: Decoder, n_max: int, cache: PrefixCache, number: int = 0) -> None:
        super().__init__(decoder, cache, number)
        self.n_max = n_max
        self.costs = Costs()
        self.policy = Policy()
        self.last_pass = Pass.BIG
        self.prompt_evaluated = 0
        self.prompt_done = 0.0
        self.n_wanted = n_max
        self.prediction: Sequence[int] = ()
        self.drafting: Drafting | None = None
        self.should_stop: Callable[[], bool] | None = None
        self.on_prompt: Callable[[int, int], object] | None = None
        self.on_logits: Callable[[int, Any], object] | None = None
        self._experts = ALL_EXPERTS
        self._rules: LossRules | None = None
        self._mass = 0
        self._correction: Correction | None = None
        self._is_afresh = False  # whether the next prompt is to be computed from its first token
        self._in_prompt = False
        self._is_guess = False
        self._state_at = -1  # how many tokens there were when the last pass left its hidden state

    @property
    def reads_prompt(self) -> bool:
        """Whether a prompt is being computed, as opposed to what follows it."""
        return self._in_prompt

    # growing

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Keep what ``prompt`` has in common with the tokens here; returns those of it that are to be run."""
        prompt, self.owed, self._before = list(prompt), [], None
        if self.on_logits is not None:
            self.leave()  # it is shown those of all the prompt
        only_big = self.policy.always_big
        # The first token after a prompt is a whole big pass's.
        has_logits = self.has_logits and self.last_pass is Pass.BIG and not self._is_lossy
        is_good = not only_big or self._n_big == len(self.tokens)
        if has_logits and is_good and self.tokens == prompt:
            return []
        if not self._is_afresh:
            self.turn_to(prompt, only_big)
        self._is_wanted, self._is_afresh = not self._is_afresh, False
        if only_big and self._n_big < len(self.tokens):
            # Rows that a little pass wrote must not be reused for an exact answer.
            self.keep(self._n_big)
        if self.decoder.native.can_step_back and len(self.tokens) > len(prompt) - _MIN_PROMPT:
            # One token alone runs through other kernels than a prompt does, and the last digits of its
            # logits differ: the same question with the same seed would get another answer.
            self.keep(max(0, len(prompt) - _MIN_PROMPT))
        self.back_to(min(common_length(self.tokens, prompt), len(prompt) - 1))
        return prompt[len(self.tokens) :]

    def leave(self) -> None:
        """Put the tokens away and have the next prompt computed from its first token."""
        self.put_away()
        self.forget()
        self._is_afresh = True

    def run_prompt(self, tokens: Sequence[int]) -> None:
        """Run tokens at the next places with all experts."""
        tokens = list(tokens)
        self._in_prompt = True
        try:
            with self._whole():
                # its log probabilities are the model's own
                rules = self.policy.prompt_loss if self.on_logits is None else None
                self.last_pass = decode_prompt(self, tokens, rules)
                self.mark()
        finally:
            self._in_prompt = False
        self.prompt_evaluated += len(tokens)
        self.prompt_done = time.perf_counter()

    def run_token(self, token: int) -> None:
        """Run a generated token at the next place, as the policy says."""
        if self.owed:
            self.run_drafted(token, ())
            return
        with self._whole():
            self.last_pass = decode_token(self, token, self.policy)
            self.mark_now_and_then()

    def run_guess(self, token: int, k: int) -> None:
        """Run a token with ``k`` experts for what it makes likely; its row is no part of the text."""
        with self._whole():
            self.use_mass(self.policy.mass)
            self.use_correction(self.policy.correction)
            self.use_loss(None)
            self.use_experts(k)
            self._is_guess = True
            try:
                self.forward([token])
            finally:
                self._is_guess = False

    def run_drafted(self, token: int, draft: Sequence[int]) -> None:
        """Run a generated token and those that may follow it in one decode, none of which counts yet.

        The logits at hand are those after ``token``; each ``accept`` goes on by a token of the draft.
        """
        with self._whole():
            said, self.owed = [*self.owed, token], []
            self.last_pass = decode_drafted(self, said, list(draft), self.policy)

    @property
    def n_left(self) -> int:
        """Tokens that the text may grow by."""
        return self.n_max - len(self.tokens) - len(self.owed)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Also for Ctrl-C, which arrives when the engine returns: the rows that were counted are
            # good, the logits are not. A memory that cannot drop the other rows starts over.
            self._row_of = -1
            if not self.decoder.native.can_step_back:
                self.forget()
            raise

    # decode.Steps

    def use_experts(self, k: int) -> None:
        self._experts = k

    def use_loss(self, rules: LossRules | None) -> None:
        self._rules = rules

    def use_mass(self, n: int) -> None:
        self._mass = n

    def use_correction(self, correction: Correction | None) -> None:
        self._correction = correction

    def forward(self, tokens: list[int]) -> None:
        if len(self.tokens) + len(tokens) > self.n_max:
            raise UsageError(f"the context of {self.n_max} tokens is full")
        keeps_state = self.policy.uses_head and len(tokens) == 1
        self._state_at = -1
        self._run_in_pieces(tokens, keeps_state)
        if keeps_state:
            self._state_at = len(self.tokens)

    def _run_in_pieces(self, tokens: list[int], keeps_state: bool) -> None:
        """Run as many tokens at a time as the scheduler takes; of a prompt each time is told."""
        tell, show = (self.on_prompt, self.on_logits) if self._in_prompt else (None, None)
        n = self.most_at_once()
        if show is not None:
            n = max(1, min(n, _LOGITS_BYTES // (4 * self.decoder.native.n_vocab)))
        if tell is not None:
            tell(0, len(tokens))
        done = end = 0
        for size in prompt_pieces(len(tokens), n, self.decoder.as_with_ubatch):
            end += size
            while done < end:
                start = len(self.tokens)
                wish = Wish(
                    self, tokens[done:end], len(tokens) - done, self._experts, self._rules,
                    every_output=show is not None, keeps_state=keeps_state, mass=self._mass,
                    correction=self._correction, is_guess=self._is_guess,
                )  # fmt: skip
                n_done = self.scheduler.run(wish)
                done += n_done
                if self._in_prompt:
                    self.mark_now_and_then()
                if show is not None:
                    for i in range(n_done):
                        show(start + i, self.decoder.logits(self._row - n_done + 1 + i))
                if tell is not None:
                    tell(done, len(tokens))

    def forward_drafted(self, tokens: list[int], n_said: int) -> None:
        if len(self.tokens) + len(tokens) > self.n_max:
            raise UsageError(f"the context of {self.n_max} tokens is full")
        self._state_at = -1
        done = 0
        while done < n_said:
            left = tokens[done:]
            wish = Wish(
                self, left, len(left), self._experts, mass=self._mass, correction=self._correction,
                is_drafted=True,
            )  # fmt: skip
            done += self.scheduler.run(wish)
        self.take_back(done - n_said)

    def step_back(self) -> None:
        self.keep(len(self.tokens) - 1)
        if not self.cut():
            raise EngineError("this model's memory cannot be rolled back, which big-little needs")

    def prefetch_masked(self) -> None:
        if self.decoder.engine is not None:
            self.decoder.engine.prefetch_masked(self.decoder.native.ctx)

    @property
    def row(self) -> int:
        """The output with the logits after the last token. Raises UsageError if they are not at hand."""
        if not self.has_logits:
            raise UsageError("there are no logits: ask for a token first")
        return self._row

    def traffic(self) -> Traffic:
        """What the answer cost so far."""
        self.scheduler.settle()
        return self.costs.traffic

    def last_logits(self) -> Any:
        return self.decoder.logits(self.row)

    def head_probability(self, token: int) -> float | None:
        head = self.decoder.head
        if head is None or self._state_at != len(self.tokens) or not self.has_logits:
            return None
        state = self.decoder.hidden(len(head.weight), self._row)
        return head.probability(state, token) if state is not None else None
