"""``/v1/embeddings``: texts or token ids as vectors of length 1, one text at a time in the model's line."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from mobile_gguf.api.aio import Job
from mobile_gguf.errors import AnswerStopped
from mobile_gguf.options.words import RANK

from .answering import ERRORS, JsonBody, check_names, in_line, note_headers
from .failures import ApiError
from .requests import EmbeddingRequest
from .serving import Serving
from .usage import sum_receipts

router = APIRouter(prefix="/v1")


class EmbeddingData(BaseModel):
    """One text's vector: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts, and the sum of their receipts."""

    prompt_tokens: int
    total_tokens: int
    receipt: dict[str, Any]


class EmbeddingList(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


@dataclass(frozen=True)
class Vector:
    """The embedding of input ``choice``, float32 [n]."""

    choice: int
    values: Any
    n_tokens: int
    receipt: dict[str, Any]


@router.post("/embeddings", response_model=EmbeddingList, responses=ERRORS, summary="Texts as vectors")
async def embeddings(request: Request, body: Annotated[EmbeddingRequest, JsonBody]) -> Response:
    """Embed one or several texts; a 400 says so if the model or the server cannot."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    notes = check_names(serving, body)
    inputs, pooling = _inputs(body), pooling_of(serving)
    vectors = await in_line(request, lambda job: embed_all(job, serving, inputs, pooling))
    _check_dimensions(body, vectors)
    pieces = _answer(serving.settings.names[0], body, vectors)
    return StreamingResponse(pieces, media_type="application/json", headers=note_headers(notes))


def pooling_of(serving: Serving) -> str | None:
    """The pooling to ask the model for, None for the file's own; raises ApiError if it makes none."""
    name, own = serving.settings.names[0], serving.model.pooling
    if own == RANK:
        reason = f"{name} is a reranker and makes no embeddings: serve an embedding model"
    elif own is None and serving.settings.pooling is None:
        reason = f"{name} is served without embeddings: start the server with --embeddings"
    else:
        return None if own is not None else serving.settings.pooling
    raise ApiError(400, reason, param="model", code="model_not_supported")


def _inputs(body: EmbeddingRequest) -> list[str | list[int]]:
    given: Any = body.input
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    for i, text in enumerate(inputs):
        if not text:
            where = "input" if given is text else f"input.{i}"
            raise ApiError(400, f"invalid {where}: the text is empty", param=where, code="invalid_value")
    return inputs


def embed_all(
    job: Job[Vector], serving: Serving, inputs: list[str | list[int]], pooling: str | None
) -> Iterator[Vector]:
    """The vectors of texts; runs in the worker's thread. Raises ApiError where it was cut."""
    for i, text in enumerate(inputs):
        try:
            made = serving.model.embed(text, pooling=pooling, should_stop=job.is_cancelled)
        except AnswerStopped:  # whoever left does not hear it
            raise ApiError(503, "the texts were cut: the server is shutting down", code="cut") from None
        receipt = made.receipt.to_dict()
        serving.metrics.add_embedding(made.n_tokens, receipt)
        yield Vector(i, made.vector, made.n_tokens, receipt)


def _check_dimensions(body: EmbeddingRequest, vectors: list[Vector]) -> None:
    n, length = body.dimensions, len(vectors[0].values)
    if n is not None and n > length:
        raise ApiError(
            400, f"dimensions is {n}: the model makes {length}", param="dimensions", code="invalid_value"
        )


async def _answer(model: str, body: EmbeddingRequest, vectors: list[Vector]) -> AsyncIterator[str]:
    """The JSON of an EmbeddingList in pieces: in one, many vectors would take twenty times their memory."""
    n_tokens = sum(vector.n_tokens for vector in vectors)
    receipt = sum_receipts(vector.receipt for vector in vectors)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "receipt": receipt}
    yield f'{{"object":"list","model":{json.dumps(model)},"usage":{json.dumps(usage)},"data":['
    for i, vector in enumerate(vectors):
        entry = {"object": "embedding", "index": vector.choice, "embedding": _written(vector.values, body)}
        yield ("," if i else "") + json.dumps(entry, separators=(",", ":"))
    yield "]}"


def _written(values: Any, body: EmbeddingRequest) -> list[float] | str:
    import numpy as np

    values = shortened(values, body.dimensions)
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
    return [float(value) for value in values]


def shortened(values: Any, n: int | None) -> Any:
    """The first ``n`` numbers of a vector, of length 1 again."""
    import numpy as np

    if n is None or n >= len(values):
        return values
    values = values[:n]
    length = np.linalg.norm(values)
    return values / length if length > 0 else values
