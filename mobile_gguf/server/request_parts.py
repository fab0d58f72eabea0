"""What requests are made of: numbers and texts, messages, and tools as OpenAI has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MAX_INT = (1 << 31) - 1
MAX_NAME = 128  # of a function: those of MCP servers have the server's name before them
MAX_TOOLS = 128
CUSTOM_ARGUMENT = "input"
TextKind = Literal["text", "input_text", "refusal", "thinking"]


def _whole(value: Any) -> Any:
    """12.0 is 12 in JSON; 12.5, true and "12" are no whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=1 << 22)]
Token = Annotated[int, Field(ge=0, le=MAX_INT)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Strict(BaseModel):
    """A request object: no conversions, and what it does not know is remembered."""

    model_config = ConfigDict(strict=True, extra="allow")


class Loose(BaseModel):
    """A request object that may hold what other versions of the API have."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Loose):
    """A part of a message; of the kinds that OpenAI has this server takes text.

    What a model thought earlier is taken and left out, as templates leave it out.
    """

    type: TextKind
    text: Text | None = None
    refusal: Text | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if isinstance(given, str) and given not in get_args(TextKind):
            raise ValueError(f"it is {given[:80]!r}, and this server takes text only")
        return given


class FunctionCall(Loose):
    """A call that the model made earlier; ``arguments`` is JSON as text."""

    name: str = Field(min_length=1, max_length=256)
    arguments: Text = ""


class CustomCall(Loose):
    """A call of a custom tool that the model made earlier."""

    name: str = Field(min_length=1, max_length=256)
    input: Text = ""


class _OfOneType(Loose):
    """What is a function, or a custom tool, of which it has the part by that name."""

    type: Literal["function", "custom"]

    @model_validator(mode="after")
    def _has_its_part(self) -> _OfOneType:
        if getattr(self, self.type) is None:
            raise ValueError(f"{self.type} is missing")
        return self


class ToolCall(_OfOneType):
    """OpenAI's tool call."""

    id: str | None = None
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    @property
    def told(self) -> FunctionCall:
        """The call of a function that it is to the model."""
        if self.type == "function":
            assert self.function is not None
            return self.function
        assert self.custom is not None
        arguments = json.dumps({CUSTOM_ARGUMENT: self.custom.input}, ensure_ascii=False)
        # not validated: its JSON may be longer than a text that is sent may be
        return FunctionCall.model_construct(name=self.custom.name, arguments=arguments)


class Message(Loose):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = Field(
        default=None, description="what the assistant thought; the template says whether it is of use"
    )
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        may_be_nothing = self.role in ("assistant", "tool", "function")
        if self.content is None and not may_be_nothing:
            raise ValueError(f"content is missing from the {self.role}'s message")
        return self


class Function(Loose):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Custom(Loose):
    """A tool that takes a text; of its ``format`` the model is not told."""

    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None


_TEXT_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {CUSTOM_ARGUMENT: {"type": "string"}},
    "required": [CUSTOM_ARGUMENT],
    "additionalProperties": False,
}


class Tool(_OfOneType):
    """OpenAI's tool."""

    function: Function | None = None
    custom: Custom | None = None

    @property
    def told(self) -> Function:
        """The function that it is to the model: a custom tool is one of a text."""
        if self.type == "function":
            assert self.function is not None
            return self.function
        assert self.custom is not None
        custom = self.custom
        return Function(name=custom.name, description=custom.description, parameters=_TEXT_PARAMETERS)

    def as_function(self) -> dict[str, Any]:
        """OpenAI's tool of a function, as chat templates know it."""
        return {"type": "function", "function": self.told.model_dump(exclude_none=True)}

    @property
    def notes(self) -> list[str]:
        """What of it is not followed."""
        form = (self.custom.format or {}).get("type", "text") if self.custom is not None else "text"
        return [] if form == "text" else [f"tool {self.told.name}: its format is not followed"]


class NamedFunction(Loose):
    """The name of a function."""

    name: str = Field(min_length=1, max_length=MAX_NAME)


class NamedTool(_OfOneType):
    """A tool to be called whatever the model thinks."""

    function: NamedFunction | None = None
    custom: NamedFunction | None = None

    @property
    def name(self) -> str:
        """Its name."""
        named = self.function if self.type == "function" else self.custom
        assert named is not None
        return named.name


class AllowedTools(Loose):
    """Which tools may be called of those that are given, and whether one has to be."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(Loose):
    """OpenAI's ``tool_choice`` of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
