"""Model references."""

from pathlib import Path

import pytest

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.files.paths import models_dir
from mobile_gguf.hub.resolve import local_models, resolve_model


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_a_path_is_itself(here):
    path = touch(here / "m.gguf")
    assert resolve_model(path) == path
    assert resolve_model("m.gguf") == Path("m.gguf")


def test_a_home_directory_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert resolve_model("~/m.gguf" if touch(here / "m.gguf") else "") == here / "m.gguf"


def test_a_name_is_a_model_of_the_data_directory(here):
    path = touch(models_dir() / "tiny.gguf")
    assert resolve_model("tiny") == path
    assert resolve_model("tiny.gguf") == path
    assert local_models() == [path]


def test_a_file_here_comes_before_a_name(here):
    touch(models_dir() / "tiny.gguf")
    touch(here / "tiny.gguf")
    assert resolve_model("tiny.gguf") == Path("tiny.gguf")


def test_a_directory_with_one_model_is_that_model(here):
    first = touch(here / "d" / "m-00001-of-00002.gguf")
    touch(here / "d" / "m-00002-of-00002.gguf")
    assert resolve_model(here / "d") == first
    touch(here / "d" / "other.gguf")
    with pytest.raises(ModelNotFoundError, match="2 GGUF files"):
        resolve_model(here / "d")


@pytest.mark.parametrize("reference", ["nothing", "no/such/file.gguf", "/no/such/file.gguf"])
def test_nothing_found(here, reference):
    with pytest.raises(ModelNotFoundError, match=f"no such model: {reference}"):
        resolve_model(reference)


def test_an_empty_directory(here):
    with pytest.raises(ModelNotFoundError, match="no GGUF file"):
        resolve_model(here)


def test_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelNotFoundError, match="hf:org/repo:Q4_K_M is not complete in the Hugging Face cache"
    ):
        resolve_model("hf:org/repo:Q4_K_M")


def test_demo_is_built_and_hears_of_progress(here, monkeypatch):
    built, heard = touch(here / "demo.gguf"), []

    def ensure_demo(*, progress):
        progress("building", 0.5)
        return built

    monkeypatch.setattr("mobile_gguf.demo.ensure_demo", ensure_demo)
    assert resolve_model("demo", lambda *step: heard.append(step)) == built
    assert heard == [("building", 0.5)]
