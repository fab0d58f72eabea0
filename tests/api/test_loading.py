"""Opening a model over a scripted engine: what is asked of it, every failure as a clear error."""

import pytest
from fake_backend import MIB, FakeBackend, fake_info

from mobile_gguf.api import loading
from mobile_gguf.api.loading import open_backend
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.guarded import NoContextError
from mobile_gguf.errors import BudgetError, EngineError, ModelFormatError
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.demand import context_size
from mobile_gguf.memory.machine import Memory
from mobile_gguf.options import LoadOptions

MOE = fake_info(expert_layers=(ExpertLayer(16, (MIB, MIB)),) * 4)
DENSE = fake_info(n_expert=0, n_expert_used=0, expert_layers=())


class FakeEngine:
    """Records the load parameters that are set and taken back."""

    def __init__(self):
        self.params = []
        self.calls = []
        self.cleared = 0
        self.error = ""

    def set_load_params(self, **params):
        self.params.append(params)

    def clear_load_params(self):
        self.cleared += 1

    def last_error(self):
        return self.error

    def checked(self, name, _doing, *arguments):
        self.calls.append((name, *arguments))
        return 0


@pytest.fixture
def opening(monkeypatch):
    """Opens with a scripted engine and library: ``opening(info, engine, **options)``."""
    constructed = []

    def open_it(info, engine, backend=None, **options):
        def construct(_info, _options, asked, engine, *, use_mmap, devices=(), planned_bytes=0, **_more):
            constructed.append((asked.n_ctx, use_mmap))
            assert (planned_bytes != 0) == (engine is not None), "what fit said is told"
            if isinstance(backend, BaseException):
                raise backend
            return backend or FakeBackend()

        monkeypatch.setattr(loading, "find_engine", lambda: engine)
        monkeypatch.setattr(loading, "capture_log", lambda _verbose: None)
        monkeypatch.setattr(loading, "try_file", lambda *_arguments: None)
        monkeypatch.setattr(loading, "with_buffers", lambda _engine, _info, asked, _keep_on: asked)
        monkeypatch.setattr(loading, "_construct", construct)
        monkeypatch.setattr(loading, "read_memory", lambda: Memory(64 << 30, 64 << 30, "the machine"))
        _, notices = open_backend(info, LoadOptions(**options))
        return constructed[-1], notices

    return open_it


def test_experts_go_into_the_store_and_the_rest_is_not_mapped(opening):
    engine = FakeEngine()
    (n_ctx, use_mmap), notices = opening(
        MOE, engine, ram_budget="64MiB", io_threads=3, eviction="moepic", io="direct"
    )
    assert engine.params == [
        {
            "budget_bytes": 64 * MIB, "io_threads": 3, "eviction": "moepic", "io": "direct", "on_host": False,
            "prefault": True,
        }
    ]  # fmt: skip
    assert (n_ctx, use_mmap, notices) == (512, False, [])


def test_a_file_that_is_refused_in_its_trial_is_not_loaded(opening, monkeypatch):
    def refuse(engine, path, files, keep_on):
        assert (path, files) == (MOE.path, MOE.files)
        keep_on()
        raise ModelFormatError("no")

    engine = FakeEngine()
    opening(MOE, engine)
    monkeypatch.setattr(loading, "try_file", refuse)
    seen = []
    with pytest.raises(ModelFormatError, match="no"):
        open_backend(MOE, LoadOptions(), lambda phase, share: seen.append((phase, share)))
    assert seen == [("loading", 0.0)]
    assert len(engine.params) == 1


def test_auto_keeps_every_expert_where_there_is_room(opening):
    engine = FakeEngine()
    opening(MOE, engine)
    assert engine.params[0]["budget_bytes"] == 0


def test_parameters_that_no_load_took_are_taken_back(opening):
    engine = FakeEngine()
    with pytest.raises(ModelFormatError):
        opening(MOE, engine, ModelFormatError("x"))
    assert engine.cleared == 1


def test_a_dense_model_is_loaded_as_llama_cpp_does_it(opening):
    engine = FakeEngine()
    (_, use_mmap), notices = opening(DENSE, engine)
    assert (use_mmap, engine.params) == (True, [])
    assert notices == ["fake.gguf has no experts: it runs as an ordinary dense model"]
    _, notices = opening(DENSE, engine, ram_budget="40%")
    assert notices[0].endswith("--ram-budget has no effect")


def test_a_stock_library_maps_experts_and_says_so(opening):
    (_, use_mmap), notices = opening(MOE, None)
    assert use_mmap
    assert notices == ["stock llama.cpp: experts are mapped, not budgeted; run `mobile-gguf engine build`"]


@pytest.mark.parametrize("budget", ["40%", "100%", 10**9])
def test_a_stock_library_refuses_a_budget(opening, budget):
    with pytest.raises(EngineError, match="--ram-budget needs the mobile-gguf engine"):
        opening(MOE, None, ram_budget=budget)


def test_an_architecture_the_engine_cannot_hold(opening):
    _, notices = opening(MOE, FakeEngine(), FakeBackend(has_store=False))
    assert notices == ["the engine cannot hold the experts of a fakemoe model: no budget, only mode exact"]


def test_a_budget_that_may_not_fit_is_a_notice(opening):
    large = ExpertLayer(16, (4 << 30,))
    _, notices = opening(
        fake_info(expert_layers=(large,) * 4, tensor_bytes=257 << 30), FakeEngine(), ram_budget="99%"
    )
    assert notices[0].startswith("--ram-budget 99% may not fit: 253.44 GiB of experts and about 1.0")


def test_a_device_that_failed_leaves_one_notice_behind(opening, monkeypatch):
    """The try's own notices speak of what is not there any more; those of the host are said once."""
    device = Device(1, "GPU0", "a GPU", 40 << 30, 80 << 30)
    monkeypatch.setattr(loading, "devices_for", lambda *_arguments: ([device], []))
    monkeypatch.setattr(loading, "set_prefetch", lambda *_arguments: None)
    monkeypatch.setattr(loading, "DeviceCalls", lambda *_arguments: None)
    monkeypatch.setattr(loading, "holder", lambda *_arguments: None)

    def start(*_arguments):
        raise EngineError("the device has no memory")

    monkeypatch.setattr(loading, "start_tier", start)
    large = fake_info(expert_layers=(ExpertLayer(16, (4 << 30,)),) * 4, tensor_bytes=257 << 30)
    _, notices = opening(large, FakeEngine(), ram_budget="99%", n_ctx=1024)
    assert [notice.split(":")[0].split(" may")[0] for notice in notices] == [
        "a context of 1024 is more than the model was trained with, 512",
        "the model stays on the host",
        "--ram-budget 99%",
    ]
    assert "about 1.01 GiB for the rest" in notices[2], "the host's demand, not that beside a device"


def test_contexts():
    assert context_size(fake_info(n_ctx_train=131072), None) == 4096
    assert context_size(fake_info(n_ctx_train=512), None) == 512
    assert context_size(fake_info(n_ctx_train=131072), 0) == 131072
    assert context_size(fake_info(n_ctx_train=512), 1000) == 1000
    assert context_size(fake_info(n_ctx_train=0), None) == 4096


def test_a_context_beyond_the_training_is_a_notice(opening):
    _, notices = opening(MOE, FakeEngine(), n_ctx=1024)
    assert notices == ["a context of 1024 is more than the model was trained with, 512"]


def test_load_errors_carry_the_reason(monkeypatch):
    monkeypatch.setattr(loading, "last_errors", lambda: "unknown model architecture: 'x'")
    error = loading._load_error(MOE, 512, ValueError("Failed to load model from file"), "")
    assert isinstance(error, ModelFormatError)
    assert str(error) == "fake.gguf cannot be loaded: unknown model architecture: 'x'"
    error = loading._load_error(MOE, 512, NoContextError("llama.cpp made no context"), "")
    assert isinstance(error, EngineError)
    assert "no context of 512 tokens" in str(error)
    error = loading._load_error(MOE, 512, ValueError("x"), "an expert budget of 1 bytes is below")
    assert isinstance(error, BudgetError)
    assert isinstance(loading._load_error(MOE, 512, ValueError("x"), "no memory"), EngineError)


def test_the_log_is_kept_for_error_messages(capsys):
    from mobile_gguf.engine import log as llama_log

    llama_log.clear_errors()
    for level, text in [
        (2, b"info\n"),
        (4, b"llama_model_load: error: bad "),
        (5, b"tensor\n"),
        (4, b"it failed\n"),
    ]:
        llama_log._on_log(level, text, None)
    assert llama_log.last_errors() == "error: bad tensor; it failed"
    assert capsys.readouterr().err == ""
    llama_log.clear_errors()
    assert llama_log.last_errors() == ""


def test_a_file_in_our_layout_needs_the_engine(opening):
    per_expert = fake_info(expert_layers=MOE.expert_layers, layout="per-expert", stock=False)
    with pytest.raises(EngineError, match=r"per-expert.*--export.*engine build"):
        opening(per_expert, None)
    opening(per_expert, FakeEngine())
