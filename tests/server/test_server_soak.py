"""Clients and servers that come and go: a short run of bench/serve_soak.py; requests by schemathesis."""

import pytest
import tiny_models
from fake_backend import FakeBackend, scripted
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("httpx", reason="pip install 'mobile-gguf[dev]'")
from server_harness import SECONDS, running

from mobile_gguf.engine.binding import find_engine


def test_a_short_soak():
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")
    from mobile_gguf.bench.serve_soak import soak

    model = tiny_models.path("qwen3moe")
    flags = ["-t", "1", "--queue", "4", "-c", "256", "--session-cache", "2MiB"]
    for seconds in (12, 48, 192):  # a machine that does little else may need longer
        report = soak(str(model), seconds, 24, flags, n_restarts=1)
        assert report["problems"] == []
        if report["outcomes"].keys() >= {"answered", "left", "full"}:
            break
    assert report["outcomes"].keys() >= {"answered", "left", "full"}
    assert report["session_bytes"]["most"] > 0
    assert len(report["servers"]) == 2


def test_requests_made_up_from_the_openapi_document(fake_model):
    schemathesis = pytest.importorskip("schemathesis", reason="pip install 'mobile-gguf[dev]'")
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    quick = settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    with running(fake_model(FakeBackend(scripted("ok"))), queue=64) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = {found.path: found for found in (result.ok() for result in schema.get_all_operations())}
        # its stream has no end
        del operations["/v1/experts"]
        assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= operations.keys()
        for operation in operations.values():
            # A request that says nothing cannot say it wrongly.
            modes = (
                list(schemathesis.GenerationMode)
                if operation.body
                else [schemathesis.GenerationMode.POSITIVE]
            )
            for mode in modes:

                @quick
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case):
                    answer = case.call(timeout=SECONDS)
                    # What fields may go together, and which model there is, no schema says.
                    beside = [positive_data_acceptance]
                    if answer.status_code == 413:  # of a list beyond its limit: refused before it is read
                        beside.append(negative_data_rejection)
                    case.validate_response(answer, excluded_checks=beside)

                check()
        assert server.chat().status_code == 200
