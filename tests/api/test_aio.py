"""The API for asyncio: order, bounds, and answers that stop when nobody waits for them."""

import asyncio

import pytest
from fake_backend import FakeBackend, scripted

from mobile_gguf.api.aio import AsyncModel
from mobile_gguf.errors import ExpertReadError, ModelBusyError, QueueFullError, UsageError


def serve(model, talk, **options):
    async def run():
        async with AsyncModel(model, **options) as served:
            return await talk(served)

    return asyncio.run(run())


def test_answers_are_those_of_the_model_in_order(fake_model):
    model = fake_model(FakeBackend(scripted("hello")))

    async def talk(served):
        streamed = [chunk.text async for chunk in served.stream("a")]
        replies = await asyncio.gather(served.generate("b"), served.chat("c", max_tokens=2))
        return "".join(streamed), [reply.text for reply in replies]

    assert serve(model, talk) == ("hello", ["hello", "he"])


def test_on_chunk_sees_every_chunk(fake_model):
    seen = []
    reply = fake_model(FakeBackend(scripted("hello"))).generate("x", on_chunk=seen.append)
    assert "".join(chunk.text for chunk in seen) == reply.text == "hello"


def test_should_stop_ends_an_answer_as_interrupted(fake_model):
    seen = []
    model = fake_model(FakeBackend(scripted("hello")))
    reply = model.generate("x", on_chunk=seen.append, should_stop=lambda: len(seen) == 2)
    assert (reply.text, reply.finish_reason) == ("he", "interrupted")


def test_leaving_a_stream_frees_the_model(fake_model):
    backend = FakeBackend(scripted("x", end=False))

    async def talk(served):
        chunks = served.stream("a")
        await anext(chunks)
        await chunks.aclose()
        task = asyncio.ensure_future(served.generate("b"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return (await served.generate("c", max_tokens=3)).text

    assert serve(fake_model(backend), talk) == "xxx"


def test_errors_reach_who_asked_and_nobody_else(fake_model):
    backend = FakeBackend(scripted("ok"))
    backend.errors = {0: ExpertReadError("no disk")}

    async def talk(served):
        with pytest.raises(ExpertReadError, match="no disk"):
            await served.generate("a")
        with pytest.raises(UsageError, match="temperature"):
            await served.generate("a", temperature=-1)
        return (await served.generate("a")).text

    assert serve(fake_model(backend), talk) == "ok"


def test_the_queue_is_bounded_and_close_refuses_what_waits(fake_model):
    backend = FakeBackend(scripted("x", end=False))
    model = fake_model(backend)

    async def talk():
        served = AsyncModel(model, queue=1)
        running = served.stream("a", max_tokens=1 << 20)
        await anext(running)
        waiting = asyncio.ensure_future(served.generate("b"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="1 requests"):
            await served.generate("c")
        await served.close()
        with pytest.raises(ModelBusyError, match="did not get its turn"):
            await waiting
        with pytest.raises(ModelBusyError, match="being closed"):
            await served.generate("d")

    model.n_ctx = 1 << 30
    asyncio.run(talk())
    assert backend.closed
