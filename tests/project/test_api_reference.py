"""The API reference is what the code says."""

from page_makers import page_maker
from places import ROOT

import mobile_gguf


def test_page_is_up_to_date():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == page_maker("make_api").page(), "run `make docs`"


def test_every_public_name_is_on_the_page():
    sections = page_maker("make_api").SECTIONS
    names = {name for _, module, names in sections if module == "mobile_gguf" for name in names}
    # the module of asyncio has a section of its own
    assert names | {"aio"} == set(mobile_gguf.__all__)
