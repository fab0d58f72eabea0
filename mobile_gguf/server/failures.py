"""Every failure as its API's error object, most as OpenAI's ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from mobile_gguf.errors import (
    GrammarError,
    MobileError,
    ModelBusyError,
    PromptTooLongError,
    QueueFullError,
    UsageError,
)

logger = logging.getLogger("mobile_gguf")

TOO_LONG = "context_length_exceeded"  # OpenAI's word, which agents look for

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


# The paths whose errors are not in OpenAI's form.
_ANTHROPIC, _OLLAMA = ("/v1/messages", "/messages"), "/api/"
_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 503: "overloaded_error"}


class ErrorDetail(BaseModel):
    """What went wrong, which parameter is to blame, and a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object, and what was answered before it happened."""

    error: ErrorDetail = Field(description="what went wrong")
    choices: list[dict[str, Any]] | None = Field(
        default=None, description="of an answer that was not streamed: what there is of it"
    )


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class ApiError(Exception):
    """A failure with the status and the error object that the client is to get."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.so_far: dict[str, Any] = {}  # what was answered before, in its API's form

    def body(self, path: str = "") -> dict[str, Any]:
        """The error object, in the form of the API that ``path`` belongs to: OpenAI's but for two."""
        kind, message = _TYPES.get(self.status, "server_error"), printable(self.message)
        if path.startswith(_OLLAMA):
            return {"error": message} | self.so_far
        if path.startswith(_ANTHROPIC):
            # the words by which its clients know that a conversation has to become shorter
            message = f"prompt is too long: {message}" if self.code == TOO_LONG else message
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": message}} | self.so_far
        param = None if self.param is None else printable(self.param)
        detail = {"message": message, "type": kind, "param": param, "code": self.code}
        return {"error": detail} | self.so_far

    def response(self, path: str = "") -> JSONResponse:
        """The whole answer to the request."""
        return JSONResponse(self.body(path), self.status, self.headers)


def printable(text: str) -> str:
    """Text as one line: what a client sent may hold half a surrogate pair, a NUL, a colour of a terminal."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def too_long(error: PromptTooLongError, param: str | None = None) -> ApiError:
    """What a client is told whose prompt cannot fit; the context is the server's, so its flag is named."""
    return ApiError(400, error.command_line or str(error), param=param, code=TOO_LONG)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of ``error``; one that is nobody's fault but ours is logged as well."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"{error}: try again later", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, ModelBusyError):
        return ApiError(503, str(error), code="model_unavailable")
    if isinstance(error, PromptTooLongError):
        return too_long(error)
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="grammar_stuck")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, MobileError):
        logger.error("%s", error)
        return ApiError(500, str(error), code="engine_error")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when a client may try again, between 1 and 120 s."""
    return {"Retry-After": str(min(120, max(1, math.ceil(seconds))))}


def add_handlers(app: FastAPI) -> None:
    """Have every error of the application come out in the form of its API."""

    @app.exception_handler(ApiError)
    @app.exception_handler(MobileError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response(request.url.path)

    @app.exception_handler(ClientLeftError)
    async def left(request: Request, _error: ClientLeftError) -> Response:
        request.app.state.serving.metrics.cancelled.inc()
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = ""
        if error.status_code in (404, 405):
            message = f"{error.detail}: {request.method} {request.url.path}"
        elif error.status_code == 400 and isinstance(error.__cause__, UnicodeDecodeError):
            message = "the body is not UTF-8"
        elif error.status_code == 400 and isinstance(error.__cause__, (RecursionError, ValueError)):
            message = "the body cannot be read: it is nested too deeply, or holds a number of too many digits"
        return ApiError(error.status_code, message or str(error.detail), headers=error.headers).response(
            request.url.path
        )


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a request, by its place; pydantic's errors, in the ``body``."""
    first = errors[0]
    # "body" first; the names of union members and validators are pydantic's own business
    where = [part for part in first["loc"][1:] if isinstance(part, int) or "[" not in part]
    if "constrained-str" in where:  # a text or parts of one: the parts' errors come next
        others = [one for one in errors if "constrained-str" not in one["loc"]]
        first = others[0] if others and others[0]["type"] != "list_type" else first
        where = [part for part in first["loc"][1:] if isinstance(part, int) or "[" not in part]
        where = [part for part in where if part != "constrained-str"]
    param = ".".join(map(str, where)) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        # a name that looks like those of union members is one all the same
        name = str(first["loc"][-1])
        param = param if where and str(where[-1]) == name else ".".join([*map(str, where), name])
        return ApiError(400, f"unrecognized request argument: {param}", param=param, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if param is None:
        return ApiError(400, f"the body must be a JSON object sent as application/json: {message}")
    return ApiError(400, f"invalid {param}: {message}", param=param, code="invalid_value")
