"""What clients may send: OpenAI's requests, with the options of this package besides.

Sampling options and the big/little policy come from their one declaration, GenerateOptions. A field that
is neither an API's nor ours is kept aside, for a note or an error (``unknown_names``), so that nothing asked
for is silently left undone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mobile_gguf.options import GenerateOptions, Opt, declared

from .request_parts import (
    MAX_INT,
    MAX_TOOLS,
    AllowedToolsChoice,
    Loose,
    Message,
    NamedTool,
    Strict,
    Text,
    TextPart,
    Tokens,
    Tool,
    Whole,
)

MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_INPUTS = 2048
MAX_BIASES = 10_000
MAX_MESSAGES = 10_000
# Fields that say how to answer, but not how to sample; all others of Generation are GenerateOptions.
_NO_OPTIONS = {"model", "n", "stream", "stream_options"}
# Declared by hand below: OpenAI has its own idea of them.
_OWN_FORM = ("stop", "json_schema", "seed", "max_tokens", "logit_bias")
_MAX_TEMPLATE_VALUES, _MAX_TEMPLATE_DEPTH = 10_000, 64
# What templates know of an effort; gpt-oss has these three.
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
# What other servers call the same.
_OTHER_NAMES = {
    "n_predict": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "reasoning_budget_tokens": "reasoning_budget",
    "thinking_budget_tokens": "reasoning_budget",
}
NOT_SAMPLING = {"stop", "json_schema"}


Id = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _is_bounded(value: Any) -> bool:
    """Whether a value of JSON is small enough to be given to a template."""
    n_values = 0
    pending = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        n_values += 1
        if depth > _MAX_TEMPLATE_DEPTH or n_values > _MAX_TEMPLATE_VALUES:
            return False
        if isinstance(one, dict):
            pending += [(item, depth + 1) for item in one.values()]
        elif isinstance(one, list):
            pending += [(item, depth + 1) for item in one]
    return True


# Names that clients send, and that change no answer here; of whatever value.
_SILENT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "background_tasks", "betas"}
    | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_control", "id_slot"}
    | {"client_metadata", "include", "timings_per_token", "return_progress", "return_tokens", "stream_id"}
    | {
        "reasoning_format",
        "include_reasoning",
        "separate_reasoning",
        "reasoning_split",
        "usage",
        "inference_geo",
    }
    | {"chat_id", "session_id", "message_id", "parent_id", "request_id", "trace", "litellm_metadata"}
    | {"provider", "transforms", "route", "plugins", "container", "context_management", "keep_alive"}
    | {"anthropic_version", "diagnostics", "speed", "user_profile_id", "workspace_id", "billing_policy"}
    | {"fallbacks", "fallback_credit_token", "access_programs", "background_options", "image"}
)


def unknown_names(body: BaseModel) -> list[str]:
    """What a request names that nobody knows; ``null`` asks for nothing."""
    given = body.model_extra or {}
    return [name for name, value in given.items() if value is not None and name not in _SILENT]


def _field(opt: Opt) -> Any:
    kind: Any = Text
    if opt.choices:
        kind = Literal[opt.choices]
    elif opt.is_flag:
        kind = bool
    elif opt.read is int:
        low = None if opt.low is None else int(opt.low)
        kind = Annotated[Whole, Field(ge=low, le=MAX_INT if opt.high is None else int(opt.high))]
    elif opt.read is float:
        kind = Annotated[float, Field(ge=opt.low, le=opt.high, allow_inf_nan=False)]
    return kind | None


if TYPE_CHECKING:

    class _Sampling(Strict):
        grammar: str | None
        mode: str | None
else:
    _Sampling = create_model(
        "_Sampling",
        __base__=Strict,
        **{
            name: (_field(opt), Field(default=None, description=opt.help))
            for name, opt in declared(GenerateOptions).items()
            if name not in _OWN_FORM
        },
    )


class StreamOptions(Loose):
    """OpenAI's ``stream_options``, and vLLM's."""

    include_usage: bool | None = Field(default=None, description="a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(
        default=None, description="the usage so far in every chunk, as vLLM has it"
    )


class Asked(_Sampling):
    """What all requests for an answer take, whichever API they are of."""

    model: str | None = Field(default=None, max_length=1000, description="the model's id, or nothing")
    seed: Whole | None = Field(default=None, ge=-(1 << 63), le=(1 << 63) - 1, description="random seed")
    logit_bias: dict[Id, Bias] | None = Field(
        default=None, max_length=MAX_BIASES, description="added to the logits of tokens, by token id"
    )
    stream: bool | None = Field(default=None, description="send the answer as it is made")

    def options(self) -> dict[str, Any]:
        """The sampling options that were given, by their names here."""
        return self.model_dump(exclude_none=True, include=OPTION_NAMES & type(self).model_fields.keys())


class Generation(Asked):
    """What both of OpenAI's kinds of completion take."""

    max_tokens: Whole | None = Field(
        default=None, ge=-1, le=MAX_INT, description="tokens at most; -1: as many as there is room for"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        default=None, description="texts that end the answer"
    )
    n: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES, description="answers to the same prompt")
    stream_options: StreamOptions | None = None
    json_schema: dict[str, Any] | None = Field(default=None, description="JSON schema the answer follows")

    @model_validator(mode="before")
    @classmethod
    def _by_other_names(cls, given: Any) -> Any:
        """llama.cpp's and vLLM's names of fields; not beside our own, which would mean two things."""
        if not isinstance(given, dict):
            return given
        renamed = {name: ours for name, ours in _OTHER_NAMES.items() if given.get(name) is not None}
        for name, ours in renamed.items():
            if given.get(ours) is not None:
                raise ValueError(f"{name} and {ours} are two names of one thing: give one of them")
        kept = {name: value for name, value in given.items() if name not in _OTHER_NAMES}
        return kept | {ours: given[name] for name, ours in renamed.items()}


OPTION_NAMES = Generation.model_fields.keys() - _NO_OPTIONS


class Thinking(Loose):
    """Anthropic's switch of thinking, which other servers have taken over."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(default=None, ge=0, le=MAX_INT)


class JsonSchema(Loose):
    """OpenAI's ``json_schema`` of a response format."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Prediction(Loose):
    """OpenAI's ``prediction``: text that the answer repeats much of."""

    type: Literal["content"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        parts = self.content if isinstance(self.content, list) else []
        return "".join(part.text or "" for part in parts) if parts else str(self.content or "")


class ResponseFormat(Loose):
    """OpenAI's ``response_format``; ``schema`` beside ``json_object`` is llama-cpp-python's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


def _kind_of_choice(given: Any) -> str:
    if not isinstance(given, (dict, NamedTool, AllowedToolsChoice)):
        return "[word]"
    kind = given.get("type") if isinstance(given, dict) else given.type
    return "[several]" if kind == "allowed_tools" else "[one]"


# Tags in brackets are left out where an error says what is wrong.
Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[word]")]
    | Annotated[NamedTool, Tag("[one]")]
    | Annotated[AllowedToolsChoice, Tag("[several]")],
    Discriminator(_kind_of_choice),
]


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Whole | None = Field(default=None, ge=-1, le=MAX_INT)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="values for the chat template, such as enable_thinking"
    )
    special: bool | None = Field(
        default=None, description="read control tokens in the messages as such, not as text"
    )
    reasoning_effort: Effort | None = Field(
        default=None,
        description="given to the chat template; none: no thoughts, minimal: it is asked for none",
    )
    thinking: Thinking | None = Field(
        default=None, description="disabled: no thoughts; budget_tokens: at most so many tokens of them"
    )
    prediction: Prediction | None = Field(
        default=None, description="what much of the answer will be: with speculate it is drafted from"
    )
    # taken and without effect here: they change no answer, or ask for what is so anyway
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None
    web_search_options: dict[str, Any] | None = None
    audio: None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None

    @field_validator("modalities", "audio", "functions", "function_call", mode="before")
    @classmethod
    def _is_done_here(cls, given: Any, field: ValidationInfo) -> Any:
        if given and field.field_name == "functions":
            raise ValueError("functions are OpenAI's tools of once: give tools")
        if isinstance(given, dict) and field.field_name == "function_call":
            raise ValueError("function_call is OpenAI's tool_choice of once: give tool_choice")
        if given is not None and field.field_name == "audio":
            raise ValueError("this server answers with text only")
        if isinstance(given, list) and field.field_name == "modalities" and set(map(str, given)) - {"text"}:
            raise ValueError("this server answers with text only")
        return given

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_small(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None and not _is_bounded(given):
            raise ValueError(f"it holds more than {_MAX_TEMPLATE_VALUES} values, or is nested too deeply")
        return given

    def options(self) -> dict[str, Any]:
        made = super().options()
        budget = None
        if self.reasoning_effort == "none" or (
            self.thinking is not None and self.thinking.type == "disabled"
        ):
            budget = 0  # for templates that know no such switch
        elif self.thinking is not None and self.thinking.type == "enabled":
            budget = self.thinking.budget_tokens
        return made if budget is None else {"reasoning_budget": budget, **made}

    def template_values(self) -> dict[str, Any]:
        """What the chat template may use besides the messages and tools."""
        values: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type != "adaptive":
            values["enable_thinking"] = self.thinking.type == "enabled"
        if self.reasoning_effort in ("none", "minimal"):
            values["enable_thinking"] = False
        if self.reasoning_effort is not None and self.reasoning_effort != "none":
            values["reasoning_effort"] = _EFFORTS.get(self.reasoning_effort, self.reasoning_effort)
        return values | (self.chat_template_kwargs or {})


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="text or token ids, or several of either")
    echo: bool | None = Field(default=None, description="begin the answer with the prompt")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: Text | None = Field(
        default=None, description="what comes after the answer, for models that have tokens for a gap"
    )
    best_of: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of is more than n: answers that nobody sees are not made here")
        if self.suffix and (self.echo or self.logprobs is not None):
            raise ValueError("suffix does not go with echo or logprobs")
        if self.suffix and not _is_text(self.prompt):
            raise ValueError("suffix needs a prompt of text: token ids have none to stand before a gap")
        return self


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or isinstance(prompt[0], str)


class EmbeddingRequest(Strict):
    """``POST /v1/embeddings``."""

    input: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="text or token ids, or several of either")
    model: str | None = Field(default=None, max_length=1000, description="the model's id, or nothing")
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="float by default")
    dimensions: int | None = Field(
        default=None, ge=1, le=MAX_INT, description="keep so many numbers of each vector, scaled to length 1"
    )
