"""``/slots``: llama-server's view of the sequences of the context, saved and restored as sessions."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from mobile_gguf.api.slots import Slots
from mobile_gguf.errors import UsageError

from ..answering import ERRORS, JsonBody, one_in_line
from ..request_parts import Loose
from ..serving import Serving

router = APIRouter()
_MOST = 4096


class SlotInfo(BaseModel):
    """A sequence of the context; ``n_prompt_tokens`` are the tokens that it holds."""

    model_config = ConfigDict(extra="allow")
    id: int
    n_ctx: int
    is_processing: bool
    n_prompt_tokens: int


class SlotFile(Loose):
    """The name that a slot is saved under."""

    filename: str | None = Field(default=None, max_length=100)


class SlotAction(BaseModel):
    """What was done to a slot, in llama-server's words."""

    model_config = ConfigDict(extra="allow")
    id_slot: int


def _slots(serving: Serving) -> Slots:
    slots = serving.model.slots
    if slots is None:
        raise UsageError("this model has no slots")
    return slots


@router.get("/slots", response_model=list[SlotInfo], responses=ERRORS, summary="The sequences of the context")
async def slots(request: Request) -> list[dict[str, Any]]:
    """What each sequence holds, in the line of the answers."""
    serving: Serving = request.app.state.serving
    found = await one_in_line(request, lambda _job: _slots(serving).all())
    return [
        {
            "id": one.number,
            "n_ctx": serving.model.n_ctx,
            "is_processing": one.is_busy,
            "n_prompt_tokens": one.n_tokens,
        }
        for one in found
    ]


@router.post("/slots/{id}", response_model=SlotAction, responses=ERRORS, summary="Save, restore, erase one")
async def act(
    request: Request,
    id: Annotated[int, Path(ge=0, le=_MOST)],
    action: Annotated[Literal["save", "restore", "erase"], Query()],
    body: Annotated[SlotFile | None, JsonBody] = None,
) -> Response:
    """Save a sequence under a name beside the conversations on disk, or have one hold what was saved."""
    serving: Serving = request.app.state.serving
    name = (body.filename if body is not None else None) or ""

    def work(_job: object) -> dict[str, Any]:
        slots = _slots(serving)
        before = time.perf_counter()
        if action == "erase":
            return {"id_slot": id, "n_erased": slots.erase(id)}
        n, n_bytes = (slots.save if action == "save" else slots.restore)(id, name)
        told, moved = ("n_saved", "n_written") if action == "save" else ("n_restored", "n_read")
        took = {f"{action}_ms": (time.perf_counter() - before) * 1e3}
        return {"id_slot": id, "filename": name, told: n, moved: n_bytes, "timings": took}

    return JSONResponse(await one_in_line(request, work))
