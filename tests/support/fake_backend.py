"""A scripted engine: the decoder's interface with bytes for tokens and a made-up model behind it.

What it "computes" depends on every row of its context and on how many experts wrote that row, so a
position that was not run again, or a row that was not overwritten, changes the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.experts import Experts, ExpertSource
from mobile_gguf.engine.loss import Buddies, LossRules
from mobile_gguf.engine.split import Split
from mobile_gguf.engine.structs import (
    Counters,
    DeviceCounters,
    LossCounters,
    ModelInfo,
    PrefetchCounters,
    WarmCounters,
)
from mobile_gguf.errors import PromptTooLongError, UsageError
from mobile_gguf.generate.passes.corrections import Corrections
from mobile_gguf.generate.passes.costs import Traffic
from mobile_gguf.generate.passes.decode import ALL_EXPERTS, Pass, Policy, decode_prompt, decode_token
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.generate.schedule.crew import Alone
from mobile_gguf.gguf.caches import CacheRows, Caches
from mobile_gguf.gguf.info import ExpertLayer, GgufInfo

BOS, EOS, N_VOCAB = 256, 257, 258
TOP_K, MIB = 8, 1 << 20

Row = tuple[int, int]  # token, experts (0: all)


def fake_caches(n_head_kv: Sequence[int], key_length: int, value_length: int) -> Caches:
    """Keys and values of layers with so many heads for them."""
    n = sum(n_head_kv)
    padded = max(n_head_kv) * sum(heads > 0 for heads in n_head_kv)
    return Caches(CacheRows(n * key_length, n * value_length, padded * value_length))


def fake_info(**changes: Any) -> GgufInfo:
    """Facts of a small MoE: 4 layers of 16 experts, 1 MiB of experts a layer."""
    facts: dict[str, Any] = {
        "path": Path("fake.gguf"),
        "files": (Path("fake.gguf"),),
        "file_bytes": 6 * MIB,
        "architecture": "fakemoe",
        "name": "Fake MoE",
        "license": "mit",
        "quantization": "Q8_0",
        "n_layer": 4,
        "n_ctx_train": 512,
        "n_embd": 64,
        "n_vocab": N_VOCAB,
        "n_head": (4,) * 4,
        "caches": fake_caches((2,) * 4, 16, 16),
        "n_expert": 16,
        "n_expert_used": TOP_K,
        "n_ff_expert": 32,
        "expert_layers": (ExpertLayer(16, (MIB // 32, MIB // 32)),) * 4,
        "tensor_bytes": 5 * MIB,
        "chat_template": "{{ messages }}",
    }
    facts |= changes
    facts.setdefault(
        "moe_layers", tuple(range(facts["n_layer"] - len(facts["expert_layers"]), facts["n_layer"]))
    )
    return GgufInfo(**facts)


def hashed_logits(rows: Sequence[Row]) -> np.ndarray:
    """Logits over printable letters that any change of any row changes; now sure, now not."""
    digest = hashlib.sha256(repr(list(rows)).encode()).digest()
    random = np.random.default_rng(list(digest[:16]))
    logits = np.full(N_VOCAB, -30.0)
    logits[ord("a") : ord("z") + 1] = random.normal(size=26) * random.choice([1.0, 4.0])
    return logits


def scripted(text: str | bytes, sure: Sequence[float] = (), end: bool = True) -> Callable[..., Any]:
    """A model that answers ``text`` whatever the prompt, and then ends if ``end``, else begins again.

    ``sure[i]`` is the top probability after a little pass over answer token i; big ones are sure.
    """
    answer = [*(text.encode() if isinstance(text, str) else text), *([EOS] if end else [])]

    def logits(rows: Sequence[Row], n_prompt: int) -> np.ndarray:
        step = len(rows) - n_prompt
        token = answer[step % len(answer)]
        is_little = rows[-1][1] != ALL_EXPERTS
        probability = sure[step - 1] if is_little and 0 < step <= len(sure) else 0.99
        values = np.full(N_VOCAB, np.log((1 - probability) / (N_VOCAB - 1)))
        values[token] = np.log(probability)
        return values

    logits.needs_prompt = True  # type: ignore[attr-defined]
    return logits


class FakeBackend:
    """Stands in for MobileLlama. ``model`` maps rows to logits; ``fail_at`` raises at that evaluation."""

    def __init__(
        self,
        model: Callable[..., Any] = hashed_logits,
        *,
        n_ctx: int = 512,
        has_engine: bool = True,
        has_store: bool = True,
        can_step_back: bool = True,
        pooling: str | None = None,
        can_generate: bool = True,
        head: Head | None = None,
        important: Sequence[float | None] = (),
    ) -> None:
        self.model = model
        self.split: Split | None = None
        self.head = head
        self.important = list(important)
        self.n_ctx = n_ctx
        self.policy = Policy()
        self.last_pass = Pass.BIG
        self.prompt_evaluated = 0
        self.prompt_done = 0.0
        self.n_wanted = 0
        self.drafting: Any = None
        self.should_stop: Callable[[], bool] | None = None
        self.on_prompt: Callable[[int, int], object] | None = None
        self.on_logits: Callable[[int, Any], object] | None = None
        self.prediction: Sequence[int] = ()
        self.can_step_back = can_step_back
        self.pooling = pooling
        self.can_generate = can_generate
        self.embedding_limit = n_ctx
        self.fill_tokens: Any = None
        self.embedded: list[tuple[list[int], str]] = []
        self.rows: list[Row] = []
        self.log: list[str] = []
        self.errors: dict[int, BaseException] = {}
        self.n_evaluations = 0
        self.sampling: dict[str, Any] = {}
        self.seed: int | None = None
        self.closed = False
        self.on_evaluate: Callable[[], None] = lambda: None
        self._experts = ALL_EXPERTS
        self.mass = 0
        self.correction: Correction | None = None  # in force
        self.corrections: Corrections = {}
        self.auto: Any = None
        self.draft: Any = None
        self.mtp: Any = None
        self.why_no_mtp = ""
        self.buddies: Buddies | None = None
        self.loss: LossRules | None = None  # in force
        self.losses: list[LossRules | None] = []  # of each evaluation
        self._n_prompt = 0
        self._counters = Counters()
        self._device_counters = DeviceCounters()
        self.device: Any = None
        self.threads: Any = None
        self.n_ubatch = 512
        self.devices: tuple[Any, ...] = ()
        self.expert_source: ExpertSource | None = None
        self.ctx = 1
        self.scheduler = Alone()
        self.has_engine = has_engine
        self.store = ModelInfo(4 * MIB, 2 * MIB, MIB, 4 * MIB, 4, 4, 16, TOP_K, 0, 0) if has_store else None

    def experts(self, info: GgufInfo) -> Experts:
        return Experts(self.expert_source, info.moe_layers, info.n_expert)

    @property
    def decoder(self) -> FakeBackend:
        """The fake does its decoding itself."""
        return self

    @property
    def sequence(self) -> FakeBackend:
        return self

    @contextlib.contextmanager
    def seated(self, prompt: Sequence[int], only_big: bool) -> Iterator[FakeBackend]:
        self.prompt_evaluated = 0
        yield self

    def traffic(self) -> Traffic:
        return Traffic(
            self.counters(), self.device_counters(), self.prefetch_counters(), self.loss_counters()
        )

    # decode.Steps

    def use_experts(self, k: int) -> None:
        self._experts = k

    def use_loss(self, rules: LossRules | None) -> None:
        self.loss = rules

    def use_mass(self, n: int) -> None:
        self.mass = n

    def use_correction(self, correction: Correction | None) -> None:
        self.correction = correction

    def forward_drafted(self, tokens: list[int], n_said: int) -> None:
        self.forward(tokens)

    def forward(self, tokens: list[int]) -> None:
        self.on_evaluate()
        error = self.errors.pop(self.n_evaluations, None)
        self.n_evaluations += 1
        self.losses.append(self.loss)
        if error is not None:
            raise error
        self.rows += [(token, self._experts) for token in tokens]
        self.log.append(f"{'big' if self._experts == ALL_EXPERTS else 'little'} {len(tokens)}")
        self._counters = self._counters + Counters(
            n_tokens=len(tokens),
            n_hits=3 * len(tokens),
            n_misses=len(tokens),
            bytes_read=1024 * len(tokens),
            stall_us=500,
            resident_bytes=MIB,
            resident_bytes_peak=MIB + 1,
        )
        if self.device is not None:
            self._device_counters = self._device_counters + DeviceCounters(
                n_hits=4 * len(tokens), n_misses=len(tokens), bytes_uploaded=2048, upload_us=1500
            )

    def step_back(self) -> None:
        self.rows.pop()
        self.log.append("back")

    def prefetch_masked(self) -> None:
        self.log.append("prefetch")

    def last_logits(self) -> np.ndarray:
        return self._logits(self.rows)

    def _logits(self, rows: Sequence[Row]) -> np.ndarray:
        if getattr(self.model, "needs_prompt", False):
            return self.model(rows, self._n_prompt)
        return self.model(rows)

    def head_probability(self, token: int) -> float | None:
        self.log.append("head")
        return self.important.pop(0) if self.important else None

    # answer.Backend

    def generate(self, tokens: Sequence[int], **sampling: Any) -> Generator[int, Any, None]:
        self.sampling = sampling
        tokens = list(tokens)
        if self.on_logits is not None:
            self.rows.clear()
        common = 0
        for row, token in zip(self.rows, tokens[:-1], strict=False):
            if row[0] != token or (self.policy.always_big and row[1] != ALL_EXPERTS):
                break
            common += 1
        del self.rows[common:]
        self._n_prompt = len(tokens)
        prompt = tokens[common:]
        if self.on_prompt is not None:
            self.on_prompt(0, len(prompt))
        on_logits = self.on_logits
        for i in range(len(prompt) if on_logits is not None else 0):
            assert on_logits is not None
            rows = [(token, ALL_EXPERTS) for token in prompt[: i + 1]]
            on_logits(i, self._logits(rows))
        self.last_pass = decode_prompt(self, prompt)
        self.prompt_evaluated += len(prompt)
        if self.on_prompt is not None:
            self.on_prompt(len(prompt), len(prompt))
        self.prompt_done = time.perf_counter()
        while True:
            logits = np.array(self.last_logits(), dtype=float)
            for biased, bias in (sampling.get("logit_bias") or {}).items():
                logits[biased] += bias
            token = int(np.argmax(logits))
            yield token
            self.last_pass = decode_token(self, token, self.policy)

    def embed_tokens(self, tokens: list[int], pooling: str) -> np.ndarray:
        self.on_evaluate()
        self.embedded.append((list(tokens), pooling))
        return np.array([len(tokens), sum(tokens), 3.0, 4.0])

    def pair_tokens(self, query: str, document: str) -> list[int]:
        return [BOS, *query.encode(), EOS, *document.encode(), EOS]

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [*([BOS] if add_bos else []), *text]

    def check_fits(self, text: bytes, n_tokens: int) -> None:
        if len(text) > max(n_tokens, 1 << 14):  # as the real one, which makes short texts into tokens
            raise PromptTooLongError(f"the text has at least {len(text)} tokens: room for {n_tokens}")

    def piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else b""

    def is_end(self, token: int) -> bool:
        return token == EOS

    def render_chat(
        self, messages: list[dict[str, Any]], *, special: bool = False, **_values: Any
    ) -> list[int]:
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise UsageError("the model's chat template refuses these messages: unknown role")
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        return [BOS, *(text + "<assistant>").encode()]

    has_form = False

    def shown(self, form: Any) -> frozenset[int]:
        raise AssertionError("a scripted engine knows no forms")

    def reader(self, form: Any) -> Any:
        return self.shown(form)

    def guide(self, form: Any, constraint: Any, budget: int | None, should_stop: Any = None) -> Any:
        return self.shown(form)

    def make_grammar(self, grammar: str | None, json_schema: Any, should_stop: Any = None) -> Any:
        return (grammar, json_schema) if grammar or json_schema else None

    def prepare_constraints(self) -> None:
        self.log.append("prepared")

    def set_seed(self, seed: int) -> None:
        self.seed = seed

    def counters(self) -> Counters:
        return self._counters

    def device_counters(self) -> DeviceCounters:
        return self._device_counters

    def prefetch_counters(self) -> PrefetchCounters:
        return PrefetchCounters()

    def loss_counters(self) -> LossCounters:
        n = sum(loss is not None for loss in self.losses)
        return LossCounters(n_layers=4 * n, n_missing=2 * n, n_dropped=n, moved_weight=0.1 * n)

    def warm_counters(self) -> WarmCounters:
        return WarmCounters()

    def reset_counters(self) -> None:
        self._device_counters = DeviceCounters()
        self._counters = Counters()

    def forget(self) -> None:
        self.rows.clear()

    def close(self) -> None:
        self.closed = True
