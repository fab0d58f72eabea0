"""One text in a context: the tokens whose rows are in memory, and how it grows by a prompt or a token.

What a row holds depends on the pass that wrote it, so a sequence knows which rows all experts wrote, and an
exact answer builds on no others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.loss import LossRules
from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.errors import EngineError, UsageError

from .decode import ALL_EXPERTS, Pass, Policy, decode_prompt, decode_token
from .decoder import Decoder
from .prefix_cache import LEAST_TOKENS, Checkpoint, Kept, PrefixCache, common_length, usable

if TYPE_CHECKING:
    from .head import Head

# The engine keeps this much more memory for logits where those of a whole prompt are asked for.
_LOGITS_BYTES = 16 << 20
# A prompt that is all in the context already is computed anew from here before its end.
_MIN_PROMPT = 2
# Of a memory that cannot be rolled back what it holds is kept after so many tokens.
_BETWEEN = 512


def prompt_pieces(n_tokens: int, n_at_once: int, as_with: int = 0) -> list[int]:
    """Tokens of each call that computes a prompt. ``as_with``: a micro-batch whose results are wanted.

    llama.cpp computes a token that is left over alone by other kernels, whose sums round otherwise; of two or
    more at once each gets the same, however many they are.
    """
    alone = int(0 < as_with < n_tokens and n_tokens % as_with == 1)
    sizes = [min(n_at_once, n_tokens - alone - start) for start in range(0, n_tokens - alone, n_at_once)]
    return sizes + [1] * alone


class TokenSequence:
    """A decode.Steps of ``decoder``, of at most ``n_max`` tokens; others are put away in ``cache`` meanwhile.

    ``policy`` says which passes its tokens get; ``last_pass`` is the one that the logits at hand come from,
    ``has_logits`` whether there are any of the last token. ``prompt_evaluated`` counts the tokens of prompts
    that were computed, ``prompt_done`` is when the last prompt was (``time.perf_counter``). While a prompt is
    computed ``should_stop`` is asked, ``on_prompt`` told how many tokens are done, of how many, and
    ``on_logits`` given a token's place, and the logits after it. ``as_with_ubatch`` is the micro-batch whose
    results are wanted where a larger one was chosen, 0 elsewhere.
    """

    def __init__(self, decoder: Decoder, n_max: int, cache: PrefixCache) -> None:
        self.decoder = decoder
        self.n_max = n_max
        self.cache = cache
        self.tokens: list[int] = []
        self.policy = Policy()
        self.head: Head | None = None
        self.last_pass = Pass.BIG
        self.has_logits = False
        self.prompt_evaluated = 0
        self.prompt_done = 0.0
        self.should_stop: Callable[[], bool] | None = None
        self.on_prompt: Callable[[int, int], object] | None = None
        self.on_logits: Callable[[int, Any], object] | None = None
        self.as_with_ubatch = 0
        self._n_big = 0  # rows at the start that big passes wrote
        self._checkpoints: list[Checkpoint] | None = None if decoder.native.can_step_back else []
        self._is_afresh = False  # whether the next prompt is to be computed from its first token
        self._is_wanted = True  # whether what is here may be put away
        self._in_prompt = False
        self._state_at = -1  # how many tokens there were when the last pass left its hidden state

    # growing

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Keep what ``prompt`` has in common with the tokens here; returns those of it that are to be run."""
        prompt = list(prompt)
        if self.on_logits is not None:
            self.leave()  # it is shown those of all the prompt
        only_big = self.policy.always_big
        # The first token after a prompt is a whole big pass's.
        self.has_logits = self.has_logits and self.last_pass is Pass.BIG and not self.decoder.is_lossy
        is_good = not only_big or self._n_big == len(self.tokens)
        if self.has_logits and is_good and self.tokens == prompt:
            return []
        if not self._is_afresh:
            self._turn_to(prompt)
        self._is_wanted, self._is_afresh = not self._is_afresh, False
        if only_big and self._n_big < len(self.tokens):
            # Rows that a little pass wrote must not be reused for an exact answer.
            self._keep(self._n_big)
        if self.decoder.native.can_step_back and len(self.tokens) > len(prompt) - _MIN_PROMPT:
            # One token alone runs through other kernels than a prompt does, and the last digits of its
            # logits differ: the same question with the same seed would get another answer.
            self._keep(max(0, len(prompt) - _MIN_PROMPT))
        self._back_to(min(common_length(self.tokens, prompt), len(prompt) - 1))
        return prompt[len(self.tokens) :]

    def _turn_to(self, prompt: list[int]) -> None:
        """Put the tokens here away if ``prompt`` goes on with others, or drops many of them."""
        only_big = self.policy.always_big
        n_good = self._n_big if only_big else len(self.tokens)
        n_here = usable(self.tokens, n_good, self._checkpoints, prompt)
        kept = None
        while kept is None:  # what is on disk may be gone by now
            found, n_there = self.cache.best(prompt, only_big)
            if found is None or n_there < n_here + LEAST_TOKENS:
                if len(self.tokens) >= common_length(self.tokens, prompt) + LEAST_TOKENS:
                    self.put_away()
                return
            kept = self.cache.take(found)
        self.put_away()
        self.forget()
        if self.decoder.load(kept.state):
            self.tokens, self._n_big, self._checkpoints = kept.tokens, kept.n_big, kept.checkpoints
        else:
            self.decoder.clear()

    def put_away(self, stays: bool = True) -> None:
        """Keep a copy of what is in the context, if there is room and it is worth it; on disk, if it may not
        stay in memory."""
        n = len(self.tokens)
        if not self._is_wanted or n < LEAST_TOKENS or not self.decoder.cut(n):
            return
        checkpoints = None if self._checkpoints is None else list(self._checkpoints)
        beside = sum(one.n_bytes for one in checkpoints or ())  # which move with it, or are kept by both
        n_bytes = self.decoder.state_bytes()
        stays = stays and self.cache.make_room(self.tokens, n_bytes, beside)
        if not stays and not self.cache.may_pass(n_bytes, beside):
            return
        state = self.decoder.save()
        if state is not None:
            self.cache.put(Kept(list(self.tokens), self._n_big, state, checkpoints), stays)

    def end(self) -> None:
        """Have all texts written that outlive the model, the one in the context last."""
        disk = self.cache.disk
        if disk is not None and disk.is_open:
            disk.flush()
            self.cache.clear()
            self.put_away(stays=False)
            disk.close()

    def leave(self) -> None:
        """Put the tokens away and have the next prompt computed from its first token."""
        self.put_away()
        self.forget()
        self._is_afresh = True

    def _back_to(self, n: int) -> None:
        """Keep the first ``n`` tokens, or as many of them as the memory can go back to."""
        if n > 0 and self.decoder.cut(n):
            self._keep(n)
            return
        for point in reversed(self._checkpoints or []):
            goes_back = point.n_tokens <= n and self.decoder.load(point.state, partial=True)
            if goes_back and self.decoder.cut(point.n_tokens):
                self._keep(point.n_tokens)
                return
        self.forget()

    def _mark(self) -> None:
        """Keep what the memory holds, if it cannot be rolled back; the oldest of such goes first."""
        points, n = self._checkpoints, len(self.tokens)
        if points is None or n < (points[-1].n_tokens if points else 0) + LEAST_TOKENS:
            return
        n_bytes = self.decoder.state_bytes(partial=True)
        while points and not self.cache.has_room(n_bytes, sum(one.n_bytes for one in points)):
            del points[0]
        if not self.cache.has_room(n_bytes):
            return
        state = self.decoder.save(partial=True)
        if state is not None:
            points.append(Checkpoint(n, state))

    def _mark_now_and_then(self) -> None:
        points = self._checkpoints
        if points is not None and len(self.tokens) >= (points[-1].n_tokens if points else 0) + _BETWEEN:
            self._mark()

    def run_prompt(self, tokens: Sequence[int]) -> None:
        """Run tokens at the next places with all experts."""
        tokens = list(tokens)
        self._in_prompt = True
        try:
            with self._whole():
                # its log probabilities are the model's own
                rules = self.policy.prompt_loss if self.on_logits is None else None
                self.last_pass = decode_prompt(self, tokens, rules)
                self._mark()
        finally:
            self._in_prompt = False
        self.prompt_evaluated += len(tokens)
        self.prompt_done = time.perf_counter()

    def run_token(self, token: int) -> None:
        """Run a generated token at the next place, as the policy says."""
        with self._whole():
            self.last_pass = decode_token(self, token, self.policy)
            self._mark_now_and_then()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Also for Ctrl-C, which arrives when the engine returns: the rows that were counted are
            # good, the logits are not. A memory that cannot drop the other rows starts over.
            self.has_logits = False
            if not self.decoder.native.can_step_back:
                self.forget()
            raise

    def forget(self) -> None:
        """Drop all tokens, so that the next prompt is computed from its first one."""
        self._keep(0)
        if not self.decoder.native.can_step_back:
            self.decoder.clear()

    def _keep(self, n: int) -> None:
        """Count the first ``n`` tokens only: the rows of the others go before the next pass."""
        del self.tokens[n:]
        self._n_big = min(self._n_big, n)
        if self._checkpoints is not None:
            self._checkpoints = [one for one in self._checkpoints if one.n_tokens <= n]
        self.has_logits = False

    # decode.Steps

    def use_experts(self, k: int) -> None:
        self.decoder.use_experts(k)

    def use_loss(self, rules: LossRules | None) -> None:
        self.decoder.use_loss(rules)

    def use_mass(self, n: int) -> None:
        self.decoder.use_mass(n)

    def forward(self, tokens: list[int]) -> None:
        if len(self.tokens) + len(tokens) > self.n_max:
            raise UsageError(f"the context of {self.n_max} tokens is full")
        is_alone = len(tokens) == 1
        # Asked for its hidden states, llama.cpp computes the logits of every token of a prompt: not there.
        self.decoder.keep_states(self.policy.uses_head and is_alone)
        self._state_at = -1
        with self.decoder.explained(self.should_stop, long=len(tokens) > 1):
            self.decoder.cut(len(self.tokens))
            self._run_in_pieces(tokens)
        if self.policy.uses_head and is_alone:
            self._state_at = len(self.tokens)

    def _run_in_pieces(self, tokens: list[int]) -> None:
        """Run as many tokens at a time as the decoder takes; of a prompt each time is told."""
        tell, show = (self.on_prompt, self.on_logits) if self._in_prompt else (None, None)
        n = self.decoder.native.n_batch
        if show is not None:
            n = max(1, min(n, _LOGITS_BYTES // (4 * self.decoder.native.n_vocab)))
        if self._checkpoints is not None:
            n_ubatch = self.decoder.native.n_ubatch
            n = min(n, max(1, _BETWEEN // n_ubatch) * n_ubatch)
        if tell is not None:
            tell(0, len(tokens))
        done = 0
        for size in prompt_pieces(len(tokens), n, self.as_with_ubatch):
            piece, start = tokens[done : done + size], len(self.tokens)
            self.decoder.run(piece, start, every_output=show is not None)
            self._append(piece)
            if self._in_prompt:
                self._mark_now_and_then()
            if show is not None:
                for i in range(len(piece)):
                    show(start + i, self.decoder.logits(i))
            done += size
            if tell is not None:
                tell(done, len(tokens))

    def _append(self, tokens: list[int]) -> None:
        is_big = self.decoder.experts == ALL_EXPERTS and not self.decoder.is_lossy
        if is_big and self._n_big == len(self.tokens):
            self._n_big += len(tokens)
        self.tokens += tokens
        self.has_logits = True

    def step_back(self) -> None:
        self._keep(len(self.tokens) - 1)
        if not self.decoder.cut(len(self.tokens)):
            raise EngineError("this model's memory cannot be rolled back, which big-little needs")

    def prefetch_masked(self) -> None:
        if self.decoder.engine is not None:
            self.decoder.engine.prefetch_masked(self.decoder.native.ctx)

    def loss_counters(self) -> LossCounters:
        return self.decoder.loss_counters()

    def last_logits(self) -> Any:
        return self.decoder.logits()

    def head_probability(self, token: int) -> float | None:
        if self.head is None or self._state_at != len(self.tokens):
            return None
        state = self.decoder.hidden(len(self.head.weight))
        return self.head.probability(state, token) if state is not None else None
