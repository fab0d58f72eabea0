"""The binding mirrors mobile.h, and an engine that does not fit is refused."""

import ctypes
import re
import sys
import types

import pytest
from engine_header import HEADER, fake_library

from mobile_gguf.engine import structs
from mobile_gguf.engine.binding import Engine, find_engine
from mobile_gguf.engine.structs import Counters
from mobile_gguf.errors import BudgetError, EngineError, ExpertReadError, UsageError


@pytest.fixture
def installed(monkeypatch):
    """Installs a library as llama-cpp-python's."""

    def install(library):
        inner = types.ModuleType("llama_cpp.llama_cpp")
        inner._lib = library  # type: ignore[attr-defined]
        inner.llama_batch = ctypes.Structure  # type: ignore[attr-defined]
        outer = types.ModuleType("llama_cpp")
        outer.llama_cpp = inner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "llama_cpp", outer)
        monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", inner)

    return install


def test_every_function_of_the_header_is_bound():
    # the version is asked for first; a file is tried by a child, which has nothing of this package
    names = set(re.findall(r"\b(mobile_\w+)\s*\(", HEADER)) - {
        "mobile_abi_version",
        "mobile_try_file",
        "mobile_mtp_try_file",
        "mobile_measure_file",
    }
    assert {f"mobile_{name}" for name in Engine(fake_library())._functions} == names


def test_a_stock_library_has_no_engine(installed):
    installed(types.SimpleNamespace(_name="libllama.so"))
    assert find_engine() is None


def test_our_library_has_one(installed):
    installed(fake_library())
    engine = find_engine()
    assert engine is not None
    assert engine.path == "libfake.so"


def test_another_abi_is_refused(installed):
    installed(fake_library(abi_version=structs.ABI_VERSION + 1))
    with pytest.raises(
        EngineError, match=rf"libfake.so has ABI version {structs.ABI_VERSION + 1}.*engine build --force"
    ):
        find_engine()


@pytest.mark.parametrize("compiled_in", [False, True])
def test_backends_that_are_libraries_are_loaded_with_ours(installed, compiled_in):
    library, asked = fake_library(), []
    library.llama_supports_rpc = lambda: asked.append(1)
    library.llama_log_set = lambda _callback, _data: None
    if compiled_in:
        library.ggml_backend_cpu_init = lambda: None
    installed(library)
    find_engine()
    assert asked == ([] if compiled_in else [1])


def test_a_library_that_lacks_a_function_is_refused(installed):
    library = fake_library()
    del library.mobile_set_replay
    installed(library)
    with pytest.raises(EngineError, match="mobile_set_replay"):
        find_engine()


def test_without_llama_cpp_the_error_says_how_to_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(EngineError, match="mobile-gguf engine build"):
        find_engine()


def test_load_params_are_passed_as_asked():
    library = fake_library()
    seen = []
    library.mobile_load_set_params.answer = lambda params: seen.append(bytes(params._obj)) or 0
    Engine(library).set_load_params(budget_bytes=1 << 33, io_threads=3, eviction="moepic", io="direct")
    params = structs.LoadParamsStruct.from_buffer_copy(seen[0])
    assert (params.budget_bytes, params.n_io_threads, params.eviction, params.io) == (1 << 33, 3, 1, 1)


def test_io_threads_default_to_the_engines():
    library = fake_library()
    seen = []
    library.mobile_load_set_params.answer = lambda params: seen.append(params._obj.n_io_threads) or 0
    Engine(library).set_load_params(budget_bytes=0)
    assert seen == [4]


def test_unknown_eviction_is_a_usage_error():
    with pytest.raises(UsageError, match="lru, moepic or decay"):
        Engine(fake_library()).set_load_params(budget_bytes=0, eviction="fifo")


@pytest.mark.parametrize(
    ("status", "error"),
    [(-1, UsageError), (-2, EngineError), (-3, BudgetError), (-4, ExpertReadError), (-5, EngineError)],
)
def test_status_codes_become_errors_with_the_engines_text(status, error):
    engine = Engine(fake_library(set_n_expert_used=status, last_error=b"what went wrong"))
    with pytest.raises(error, match="what went wrong"):
        engine.set_n_expert_used(1, 2)


def test_a_status_without_a_text_still_says_something():
    with pytest.raises(EngineError, match="resetting counters failed with engine status -2"):
        Engine(fake_library(reset_counters=-2)).reset_counters(1)


def test_counters_are_read_field_by_field():
    def fill(_ctx, pointer):
        for i, field in enumerate(structs.CountersStruct._fields_):
            setattr(pointer._obj, field[0], i)
        return 0

    counters = Engine(fake_library(get_counters=fill)).counters(1)
    assert list(vars(counters).values()) == list(range(13))


def test_counters_add_up_but_for_the_present_state():
    both = Counters(n_hits=1, resident_bytes=5, resident_bytes_peak=9) + Counters(
        n_hits=2, resident_bytes=3, resident_bytes_peak=4
    )
    assert (both.n_hits, both.resident_bytes, both.resident_bytes_peak) == (3, 3, 9)


def test_a_model_without_a_store_has_no_info():
    assert Engine(fake_library(model_get_info=-2)).model_info(1) is None


def test_a_failed_prefetch_is_only_a_missed_hint():
    assert Engine(fake_library(prefetch_masked=-4)).prefetch_masked(1) == 0


def test_residency_comes_in_rows():
    def fill(_model, state, n):
        for i in range(n):
            state[i] = i % 3
        return 0

    assert Engine(fake_library(model_get_residency=fill)).residency(1, 2, 4) == [
        bytes([0, 1, 2, 0]),
        bytes([1, 2, 0, 1]),
    ]
