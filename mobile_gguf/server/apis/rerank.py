"""``/v1/rerank``: documents by how well they answer a query, as Jina's and Cohere's clients ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from mobile_gguf.api.aio import Job
from mobile_gguf.api.embedding import Score
from mobile_gguf.errors import AnswerStopped
from mobile_gguf.options.words import RANK

from ..answering import ERRORS, JsonBody, Value, check_names, in_line, note_headers
from ..failures import ApiError
from ..request_parts import MAX_INT, Loose, Strict, Text, Whole
from ..requests import MAX_INPUTS
from ..serving import Serving
from ..usage import sum_receipts

router = APIRouter(prefix="/v1")


class Document(Loose):
    """A document as Cohere's clients send one."""

    text: Text


class RerankRequest(Strict):
    """``POST /v1/rerank``."""

    model: str | None = Field(default=None, max_length=1000)
    query: Text
    documents: list[Text | Document] | None = Field(default=None, max_length=MAX_INPUTS)
    texts: list[Text] | None = Field(
        default=None, max_length=MAX_INPUTS, description="TEI's name of documents"
    )
    top_n: Whole | None = Field(default=None, ge=1, le=MAX_INT, description="tell so many of the best")
    return_documents: bool | None = None


class Ranked(BaseModel):
    """A document by its place in the request, and its score."""

    model_config = ConfigDict(extra="allow")
    index: int
    relevance_score: float


class Ranking(BaseModel):
    """The documents, the best one first."""

    model: str
    object: Literal["list"]
    results: list[Ranked]
    usage: dict[str, Any]


@router.post("/rerank", response_model=Ranking, responses=ERRORS, summary="Documents by how well they answer")
async def rerank(request: Request, body: Annotated[RerankRequest, JsonBody]) -> Response:
    """Score each document with the query; a 400 says so if the model is no reranker."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    notes = check_names(serving, body)
    name = serving.settings.names[0]
    if serving.model.pooling != RANK:
        reason = f"{name} is no reranker: serve a model whose file says so (pooling_type rank)"
        raise ApiError(400, reason, param="model", code="model_not_supported")
    given = body.documents if body.documents is not None else body.texts
    texts = [one if isinstance(one, str) else one.text for one in given or ()]
    if not texts:
        raise ApiError(400, "documents is missing: give a list of texts", param="documents")
    scores = await in_line(request, lambda job: _scores(job, serving, body.query, texts))
    found = [one.value for one in scores]
    best = sorted(range(len(texts)), key=lambda i: -found[i].score)[: body.top_n]
    with_text = bool(body.return_documents)
    results = [
        {"index": i, "relevance_score": found[i].score}
        | ({"document": {"text": texts[i]}} if with_text else {})
        for i in best
    ]
    n_tokens = sum(one.n_tokens for one in found)
    receipt = sum_receipts(one.receipt.to_dict() for one in found)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "receipt": receipt}
    answer = {"model": name, "object": "list", "results": results, "usage": usage}
    return JSONResponse(answer, headers=note_headers(notes))


def _scores(job: Job[Value[Score]], serving: Serving, query: str, texts: list[str]) -> Iterator[Value[Score]]:
    for i, text in enumerate(texts):
        try:
            made = serving.model.rank(query, text, should_stop=job.is_cancelled)
        except AnswerStopped:  # whoever left does not hear it
            raise ApiError(503, "the texts were cut: the server is shutting down", code="cut") from None
        serving.metrics.add_embedding(made.n_tokens, made.receipt.to_dict())
        yield Value(made, i)
