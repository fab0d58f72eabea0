"""The API reference is what the code says."""

import importlib.util

from places import ROOT

import mobile_gguf


def _make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date():
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == _make_api().page(), "run `make docs`"


def test_every_public_name_is_on_the_page():
    names = {name for _, module, names in _make_api().SECTIONS if module == "mobile_gguf" for name in names}
    # the module of asyncio has a section of its own
    assert names | {"aio"} == set(mobile_gguf.__all__)
