"""The device tier's binding mirrors mobile.h, and its calls pass on what they are given."""

import types

import pytest
from engine_header import fake_library

from mobile_gguf.engine import structs
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.devices import device_array, list_devices
from mobile_gguf.errors import BudgetError, EngineMemoryError, UsageError


def calls(**answers):
    defaults = structs.DeviceParamsStruct(n_batch_max=32, n_uploads=4)
    library = fake_library(**{"device_default_params": defaults, **answers})
    return DeviceCalls(Engine(library), 7), library


def test_a_start_passes_on_what_was_asked_and_keeps_the_engines_defaults():
    seen = []
    made, _ = calls(device_start=lambda ctx, params: seen.append((ctx, params._obj)) or 0)
    made.start(1 << 33, miss="cpu", placement="layers", eviction="lru", poison=True)
    ((ctx, params),) = seen
    assert (ctx, params.budget_bytes, params.miss, params.placement, params.eviction) == (7, 1 << 33, 2, 2, 0)
    assert (params.n_batch_max, params.n_uploads, params.poison) == (32, 4, 1)


@pytest.mark.parametrize(("status", "error"), [(-3, BudgetError), (-5, EngineMemoryError)])
def test_a_failed_start_raises_with_the_engines_text(status, error):
    made, _ = calls(device_start=status, last_error=b"GPU0: no memory")
    with pytest.raises(error, match="GPU0: no memory"):
        made.start(1)


def test_unknown_choices_are_usage_errors():
    made, _ = calls()
    with pytest.raises(UsageError, match="auto, fetch or cpu"):
        made.start(1, miss="fly")
    with pytest.raises(UsageError, match="host, cache or layers"):
        made.set_placement("disk")


def test_devices_and_counters_are_read_field_by_field():
    def fill_info(_ctx, i, info):
        info._obj.name, info._obj.description = b"GPU0", "Karte \xe4".encode()
        info._obj.pool_bytes, info._obj.n_layers = 10 + i, 3
        return 0

    def fill_counters(_ctx, counters):
        for i, field in enumerate(structs.DeviceCountersStruct._fields_):
            setattr(counters._obj, field[0], i)
        return 0

    made, _ = calls(device_count=2, device_get_info=fill_info, device_get_counters=fill_counters)
    first, second = made.devices()
    assert (first.name, first.description, first.pool_bytes, second.pool_bytes) == ("GPU0", "Karte ä", 10, 11)
    assert list(vars(made.counters()).values()) == list(range(22))


def test_device_counters_add_up_but_for_the_present_state():
    both = structs.DeviceCounters(
        n_hits=1, resident_bytes=5, resident_bytes_peak=9, n_ahead_unused=7
    ) + structs.DeviceCounters(n_hits=2, resident_bytes=3, resident_bytes_peak=4, n_ahead_unused=2)
    assert (both.n_hits, both.resident_bytes, both.resident_bytes_peak) == (3, 3, 9)
    assert both.n_ahead_unused == 2


# ggml's registry


def registry(*devices):
    """A library with (name, type, registry) devices, handles counting from 100."""

    def memory(handle, free, total):
        assert devices[handle - 100][2] != "gone"
        free._obj.value, total._obj.value = handle, 1000

    calls = {
        "dev_count": lambda: len(devices),
        "dev_get": lambda i: 100 + i,
        "dev_type": lambda handle: devices[handle - 100][1],
        "dev_name": lambda handle: devices[handle - 100][0].encode(),
        "dev_description": lambda handle: b"text",
        "dev_memory": memory,
        "dev_backend_reg": lambda handle: handle,
        "reg_name": lambda handle: b"RPC" if devices[handle - 100][2] != "" else b"CUDA",
    }

    return types.SimpleNamespace(**{f"ggml_backend_{name}": call for name, call in calls.items()})


def test_servers_come_first_and_integrated_gpus_only_without_others():
    library = registry(
        ("CPU", 0, ""), ("GPU0", 1, ""), ("iGPU", 2, ""), ("RPC0", 1, "rpc"), ("RPC1", 1, "gone")
    )
    assert [device.name for device in list_devices(library, [103])] == ["RPC0", "GPU0"]
    assert [device.name for device in list_devices(registry(("CPU", 0, ""), ("iGPU", 2, "")))] == ["iGPU"]


def test_servers_that_were_not_named_are_not_asked():
    assert list_devices(registry(("CPU", 0, ""), ("RPC0", 1, "gone"))) == []


def test_a_library_without_a_registry_has_no_devices():
    assert list_devices(types.SimpleNamespace()) == []


def test_the_list_for_llama_cpp_ends_with_a_null():
    found = list_devices(registry(("GPU0", 1, ""), ("GPU1", 1, "")))
    assert list(device_array(found)) == [100, 101, None]
    assert list(device_array([])) == [None]
