"""What the making of answers needs of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from mobile_gguf.engine.structs import (
    Counters,
    DeviceCounters,
    LossCounters,
    ModelInfo,
    PrefetchCounters,
    WarmCounters,
)

from .passes.costs import Traffic
from .passes.decode import Pass, Policy
from .schedule.crew import Crew

if TYPE_CHECKING:
    from mobile_gguf.device.tier import DeviceTier
    from mobile_gguf.engine.devices import Device
    from mobile_gguf.engine.experts import Experts
    from mobile_gguf.engine.loss import Buddies
    from mobile_gguf.engine.split import Split
    from mobile_gguf.gguf.info import GgufInfo

    from .context.threads import FollowingThreads
    from .form.form import Form
    from .form.reading import AnswerReader
    from .loss.auto import Auto
    from .passes.corrections import Corrections
    from .passes.head import Head
    from .prompts.gap import FillTokens
    from .speculation.draft_model import DraftModel
    from .speculation.drafting import Drafting
    from .speculation.mtp_context import MtpContext


class Text(Protocol):
    """What an answer needs of the text that it continues; TokenSequence is the real one."""

    policy: Policy
    last_pass: Pass
    prompt_evaluated: int
    prompt_done: float
    should_stop: Callable[[], bool] | None  # asked while a prompt is computed
    on_prompt: Callable[[int, int], object] | None  # told how many of its tokens are done, of how many
    n_wanted: int  # tokens that the answer may have
    prediction: Sequence[int]  # what much of the answer may be
    drafting: Drafting | None  # None where none are guessed
    on_logits: Callable[[int, Any], object] | None  # given a prompt token's place, and the logits after it

    def traffic(self) -> Traffic: ...  # what the answer cost so far


class Backend(Protocol):
    """What an answer needs of a decoder; MobileLlama is the real one, tests script another."""

    store: ModelInfo | None  # None without an expert store
    has_engine: bool
    device: DeviceTier | None  # None without slots on a device
    split: Split | None  # None where experts are kept whole
    threads: FollowingThreads | None  # None where their number is fixed
    devices: tuple[Device, ...]  # that the model is on; none: the host alone
    auto: Auto | None  # what mode auto knows of the model; None before it was asked for
    draft: DraftModel | None  # a smaller model that drafts
    mtp: MtpContext | None  # the model's own block that does
    corrections: Corrections  # of little tokens; empty for a model that was not calibrated
    why_no_mtp: str  # where it was asked for and is not there

    @property
    def scheduler(self) -> Crew: ...  # of those who make answers
    @property
    def n_ubatch(self) -> int: ...
    @property
    def can_step_back(self) -> bool: ...
    @property
    def head(self) -> Head | None: ...  # None for a model that was not calibrated
    @property
    def buddies(self) -> Buddies | None: ...  # likewise
    @property
    def can_generate(self) -> bool: ...
    @property
    def pooling(self) -> str | None: ...  # what the file asks for
    @property
    def embedding_limit(self) -> int: ...
    @property
    def fill_tokens(self) -> FillTokens | None: ...  # None for a model that fills no gaps

    def seated(self, prompt: Sequence[int], only_big: bool) -> AbstractContextManager[Text]: ...
    def experts(self, info: GgufInfo) -> Experts: ...
    def embed_tokens(self, tokens: list[int], pooling: str) -> Any: ...
    def pair_tokens(self, query: str, document: str) -> list[int]: ...  # for a reranker
    def generate(self, tokens: list[int], **sampling: Any) -> Generator[int, Any, None]: ...
    def tokenize(self, text: bytes, add_bos: bool = ..., special: bool = ...) -> list[int]: ...
    def piece(self, token: int, special: bool = ...) -> bytes: ...
    def is_end(self, token: int) -> bool: ...
    def last_logits(self) -> Any: ...
    def check_fits(self, text: bytes, n_tokens: int) -> None: ...
    @property
    def has_form(self) -> bool: ...  # whether prompts of chats know the form of their answers
    def render_chat(
        self, messages: list[dict[str, Any]], *, special: bool = ..., **values: Any
    ) -> list[int]: ...  # a Prompt where it knows the answer's form; ``calls`` among the values are for that
    def shown(self, form: Form) -> frozenset[int]: ...
    def reader(self, form: Form) -> AnswerReader: ...
    def guide(
        self, form: Form, constraint: Any, budget: int | None, should_stop: Callable[[], bool] | None = ...
    ) -> Any: ...
    def make_grammar(
        self, grammar: str | None, json_schema: Any, should_stop: Callable[[], bool] | None = ...
    ) -> Any: ...
    def prepare_constraints(self) -> None: ...
    def set_seed(self, seed: int) -> None: ...
    def counters(self) -> Counters: ...
    def device_counters(self) -> DeviceCounters: ...
    def prefetch_counters(self) -> PrefetchCounters: ...
    def loss_counters(self) -> LossCounters: ...
    def warm_counters(self) -> WarmCounters: ...
    def reset_counters(self) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...
