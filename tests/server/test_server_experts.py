"""The expert map of the server: which layers it has, what each reader sees of what is asked for."""

from __future__ import annotations

import json

import httpx
import pytest
from expert_source import ScriptedSource
from fake_backend import MIB, FakeBackend, fake_info, scripted
from server_harness import SECONDS, get, running

from mobile_gguf.engine.structs import LOADING, RESIDENT
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.server.experts import ExpertMap


@pytest.fixture
def source():
    """Four layers, the first of them dense."""
    source = ScriptedSource(4, 16)
    source.host_codes[1, :2] = RESIDENT
    source.host_codes[3, 15] = LOADING
    return source


@pytest.fixture
def model(source, fake_model):
    backend = FakeBackend(scripted("hello"))
    backend.expert_source = source
    return fake_model(backend, info=fake_info(expert_layers=(ExpertLayer(16, (MIB // 32, MIB // 32)),) * 3))


def test_a_dense_layer_is_no_row_and_is_named(model):
    shown = ExpertMap(model).snapshot()
    assert (shown["n_layer"], shown["layers"], shown["dense_layers"]) == (4, [1, 2, 3], [0])
    assert shown["tiers"] == {"host": ["22" + "0" * 14, "0" * 16, "0" * 15 + "1"]}
    assert shown["resident"] == {"host": 2}


def test_a_device_is_a_tier_of_its_own(model, source):
    source.device_codes = source.host_codes.copy()
    source.device_codes[2, 3] = RESIDENT
    shown = ExpertMap(model).snapshot()
    assert shown["tiers"]["device"][1] == "0002" + "0" * 12
    assert shown["resident"] == {"host": 2, "device": 3}


def test_the_last_token_shows_while_an_answer_is_made(model, source):
    of = ExpertMap(model)
    with of.following() as following, of.answering():
        source.add((0, 1, 5, True), (1, 1, 0, False), (1, 1, 7, True))
        shown = following.snapshot()
        assert shown["tiers"]["host"][0] == "32" + "0" * 5 + "4" + "0" * 8
        assert shown["resident"] == {"host": 2}
        assert following.snapshot() == shown  # nothing new
        # a layer shows what it asked for last, wherever the next token is when somebody looks
        source.add((1, 3, 4, True), (2, 1, 2, False))
        for entry in [(2, 2, 6, True), (2, 3, 0, False)]:
            rows = following.snapshot()["tiers"]["host"]
            assert (rows[0], rows[2]) == ("223" + "0" * 13, "0" * 4 + "4" + "0" * 10 + "1")
            source.add(entry)
        rows = following.snapshot()["tiers"]["host"]
        assert (rows[1], rows[2]) == ("0" * 6 + "4" + "0" * 9, "3" + "0" * 14 + "1")
    assert not source.watched


def test_readers_take_nothing_from_each_other_and_an_idle_map_is_plain(model, source):
    of = ExpertMap(model)
    with of.following() as one, of.following() as other:
        with of.answering():
            source.add((0, 1, 5, True))
            assert one.snapshot() == other.snapshot()
            assert one.snapshot()["tiers"]["host"][0][5] == "4"
        assert one.snapshot()["tiers"]["host"][0][5] == "0"
        assert of.snapshot()["tiers"]["host"][0][5] == "0"


def test_a_closed_model_has_no_tiers(model):
    of = ExpertMap(model)
    model.close()
    assert of.snapshot()["tiers"] == {}


def test_the_answer_over_http(model, source):
    with running(model) as server:
        assert get(f"{server.url}/v1/experts").json()["dense_layers"] == [0]
        with httpx.stream("GET", f"{server.url}/v1/experts?stream=true", timeout=SECONDS) as events:
            lines = events.iter_lines()  # kept: without it the stream would be closed
            first = next(line for line in lines if line.startswith("data: "))
            assert json.loads(first[6:])["layers"] == [1, 2, 3]
            assert source.watched
