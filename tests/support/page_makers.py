"""The programs that write pages and pictures of ``docs``, as modules."""

import importlib.util
from types import ModuleType

from places import ROOT


def page_maker(name: str) -> ModuleType:
    """``docs/NAME.py``, loaded anew."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
