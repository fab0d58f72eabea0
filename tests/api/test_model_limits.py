"""What a Model cannot do, misuse, failures and interruptions, over the scripted engine."""

import logging
import threading

import pytest
from fake_backend import FakeBackend, fake_info, scripted

from mobile_gguf.errors import EngineError, ExpertReadError, ModelBusyError, UsageError


def texts(chunks):
    return [chunk.text for chunk in chunks]


# what a model cannot do


def notices(fake_model, caplog, backend=None, info=None, **options):
    model = fake_model(backend, info=info, **options)
    reply = model.generate("x", max_tokens=3)
    assert reply.receipt.mode == "exact"
    assert reply.receipt.tokens_big == 3
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_little_on_a_dense_model_is_said_to_have_no_effect(fake_model, caplog):
    info = fake_info(n_expert=0, n_expert_used=0, expert_layers=())
    backend = FakeBackend(has_store=False)
    assert notices(fake_model, caplog, backend, info, mode="little") == [
        "fake.gguf has no experts: mode little has no effect"
    ]


def test_little_on_a_top_1_model_is_said_to_have_no_effect(fake_model, caplog):
    (notice,) = notices(fake_model, caplog, info=fake_info(n_expert_used=1), mode="big-little")
    assert notice == "fake.gguf routes every token to one expert: mode big-little has no effect"


def test_a_little_k_that_is_not_little_is_said_to_have_no_effect(fake_model, caplog):
    (notice,) = notices(fake_model, caplog, mode="little", little_k=9)
    assert notice == "little_k 9 is not below this model's top-k, 8: mode little has no effect"


def test_a_model_whose_experts_the_engine_cannot_hold(fake_model, caplog):
    (notice,) = notices(fake_model, caplog, FakeBackend(has_store=False), mode="little")
    assert "cannot hold the experts of a fakemoe model" in notice


def test_a_notice_is_given_once(fake_model, caplog):
    model = fake_model(info=fake_info(n_expert_used=1), mode="little")
    model.generate("x", mode="little", max_tokens=1)
    assert len(model.notices) == 1
    assert len(caplog.records) == 1


def test_little_without_the_engine_says_how_to_build_it(fake_model):
    backend = FakeBackend(has_engine=False, has_store=False)
    with pytest.raises(
        EngineError, match=r"mode little needs the mobile-gguf engine.*mobile-gguf engine build"
    ):
        fake_model(backend, mode="little")
    assert backend.closed
    model = fake_model(FakeBackend(scripted("fine"), has_engine=False, has_store=False))
    assert model.generate("x").text == "fine"
    with pytest.raises(EngineError):
        model.generate("x", mode="big-little")


def test_a_recurrent_model_refuses_big_little_by_confidence_only(fake_model):
    with pytest.raises(UsageError, match="cannot be rolled back: run `mobile-gguf calibrate"):
        fake_model(FakeBackend(can_step_back=False), mode="big-little")
    assert fake_model(FakeBackend(can_step_back=False), mode="little").mode == "little"


# misuse, failures, interruptions


def test_a_second_answer_while_one_is_streamed_is_refused(fake_model):
    model = fake_model(FakeBackend(scripted("abc")))
    stream = model.stream("x")
    next(stream)
    with pytest.raises(ModelBusyError, match="already generating"):
        model.generate("y")
    stream.close()
    assert model.generate("y").text == "abc"


def test_a_stream_that_was_never_started_blocks_nothing(fake_model):
    model = fake_model(FakeBackend(scripted("abc")))
    stream = model.stream("x")
    assert model.generate("y").text == "abc"
    assert "".join(texts(stream)) == "abc"


def test_a_second_thread_is_refused(fake_model):
    backend = FakeBackend(scripted("abc"))
    model = fake_model(backend)
    inside, leave, refused = threading.Event(), threading.Event(), []

    def hold():
        inside.set()
        leave.wait(300)

    backend.on_evaluate = hold
    worker = threading.Thread(target=model.generate, args=("x",))
    worker.start()
    try:
        assert inside.wait(300)
        for misuse in (lambda: model.generate("y"), model.close):
            with pytest.raises(ModelBusyError) as caught:
                misuse()
            refused.append(str(caught.value))
    finally:
        leave.set()
        worker.join(300)
    assert "one thread at a time" in refused[0]
    assert "wait before closing" in refused[1]
    assert model.generate("y").text == "abc"


def test_after_close_everything_is_refused(fake_model):
    backend = FakeBackend()
    model = fake_model(backend)
    model.close()
    model.close()
    assert backend.closed
    for use in (
        lambda: model.generate("x"),
        lambda: model.chat("x"),
        lambda: model.tokenize("x"),
        model.stats,
    ):
        with pytest.raises(ModelBusyError, match="is closed: load it again"):
            use()


def test_leaving_the_context_ends_a_stream_and_closes(fake_model):
    backend = FakeBackend()
    with fake_model(backend) as model:
        stream = model.stream("x")
        next(stream)
    assert backend.closed
    assert list(stream) == []


def test_closing_a_stream_early_leaves_the_model_usable(fake_model):
    model = fake_model(FakeBackend(scripted("abc")))
    for chunk in model.stream("x"):
        if chunk.text == "b":
            break
    assert model.generate("x").text == "abc"


def interrupting(text, at):
    backend = FakeBackend(scripted(text))
    backend.errors[at] = KeyboardInterrupt()
    return backend


def test_ctrl_c_keeps_the_text_so_far(fake_model):
    model = fake_model(interrupting("abcdef", 3))
    reply = model.generate("x")
    assert (reply.text, reply.finish_reason) == ("abc", "interrupted")
    assert reply.usage["completion_tokens"] == 3
    assert model.generate("x").text == "abcdef"


def test_ctrl_c_ends_a_stream_with_a_last_chunk(fake_model):
    chunks = list(fake_model(interrupting("abcdef", 2)).stream("x"))
    assert texts(chunks) == ["a", "b", ""]
    assert (chunks[-1].finish_reason, chunks[-1].token) == ("interrupted", None)


def test_ctrl_c_in_the_prompt_leaves_an_empty_answer(fake_model):
    reply = fake_model(interrupting("abc", 0)).generate("x")
    assert (reply.text, reply.finish_reason, reply.receipt.tokens_big) == ("", "interrupted", 0)


def test_ctrl_c_gives_back_text_that_waited_for_a_stop_string(fake_model):
    reply = fake_model(interrupting("ab ST", 5)).generate("x", stop="STOP")
    assert reply.text == "ab ST"


@pytest.mark.parametrize("at", [0, 2])
def test_a_failed_read_is_raised_and_the_model_stays_usable(fake_model, at):
    backend = FakeBackend(scripted("abc"))
    backend.errors[at] = ExpertReadError("fake.gguf: layer 1, expert 2: short read")
    model = fake_model(backend)
    with pytest.raises(ExpertReadError, match="layer 1, expert 2") as failed:
        model.generate("x")
    assert failed.value.reply.text == "abc"[:at]
    assert failed.value.reply.finish_reason == "interrupted"
    assert model.generate("x").text == "abc"


def test_several_models_at_once(fake_model):
    one, two = (fake_model(FakeBackend(scripted(text))) for text in ("first", "second"))
    streams = [one.stream("x"), two.stream("x")]
    first, second = ("".join(texts(stream)) for stream in streams)
    assert (first, second) == ("first", "second")


def test_the_clock_stands_still_while_the_consumer_works(fake_model, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    backend = FakeBackend(scripted("abc"))

    def work():
        now[0] += 1.0

    backend.on_evaluate = work
    rates = []
    for chunk in fake_model(backend).stream("x"):
        now[0] += 100.0
        rates.append(chunk.tokens_per_second)
    # one second for the prompt, then one for each of three passes
    assert rates[-1] == pytest.approx(4 / 3)


def test_a_model_in_the_list_of_open_ones_is_closed_at_exit(fake_model):
    from mobile_gguf.api import hold

    backend = FakeBackend()
    model = fake_model(backend)
    hold._close_all()
    assert backend.closed
    assert repr(model).endswith("closed>")


def test_repr(fake_model):
    model = fake_model(mode="little")
    assert repr(model) == "<Model fake.gguf little>"
    model.close()
    assert repr(model) == "<Model fake.gguf closed>"
