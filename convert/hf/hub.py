"""Checkpoints from the Hugging Face Hub: `hf:org/repo`, into the Hugging Face cache."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, ModelNotFoundError, UsageError

from ..meter import Progress

PREFIX = "hf:"
_REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?P<quant>:.*)?")
_SAFETENSORS, _BIN = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ("*.json", "README.md", "*.txt", "tokenizer.model", "*.tiktoken", "*.jinja")


def is_reference(text: str) -> bool:
    """True for what `fetch_checkpoint` understands."""
    return text.startswith(PREFIX)


def repository_name(reference: str) -> str:
    """The last part of the repository's name, for naming files after it. Raises UsageError."""
    return _parsed(reference)["repo"].split("/")[1]


def fetch_checkpoint(reference: str, *, with_code: bool, progress: Progress) -> Path:
    """Download what a conversion needs of `hf:org/repo[@revision]` and return its folder in the cache.

    What is in the cache already is not downloaded again, and a broken download goes on where it stopped.
    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. with_code: also
    the repository's Python files. Raises UsageError, ModelNotFoundError or MobileError, one line each.
    """
    parsed = _parsed(reference)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"{reference} needs huggingface_hub: pip install 'mobile-gguf[convert]'")
    repo, revision = parsed["repo"], parsed["revision"]
    progress(f"asking the Hub for {repo}", 0.0)
    return _explained(reference, lambda: _download(repo, revision, with_code, progress))


def _parsed(reference: str) -> dict[str, str]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(
            f"{reference!r} is no repository on the Hub: write hf:ORG/REPO or hf:ORG/REPO@REVISION"
        )
    if match["quant"]:
        raise UsageError(
            f"{reference} names a GGUF of a repository, which this version cannot fetch: download the file"
            " and convert it by its path"
        )
    return {"repo": match["repo"], "revision": match["revision"]}


def _download(repo: str, revision: str | None, with_code: bool, progress: Progress) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    def snapshot(weights: str) -> Path:
        patterns = [*_SMALL_FILES, *(["*.py"] if with_code else []), weights]
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"],
            tqdm_class=_reporter(repo, progress),
        )  # fmt: skip
        return Path(folder)

    if constants.HF_HUB_OFFLINE:
        folder = snapshot(_SAFETENSORS)
        return folder if any(folder.glob(_SAFETENSORS)) else snapshot(_BIN)
    info = HfApi().model_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    if any(fnmatch(name, _SAFETENSORS) for name in names):
        return snapshot(_SAFETENSORS)  # not the same weights a second time in the older format
    if any(fnmatch(name, _BIN) for name in names):
        return snapshot(_BIN)
    raise ModelNotFoundError(_no_weights(repo, names))


def _no_weights(repo: str, names: list[str]) -> str:
    if any(name.endswith(".gguf") for name in names):
        return f"hf:{repo} holds GGUF files, no checkpoint: download one of them and convert it by its path"
    return f"hf:{repo} holds no model*.safetensors and no pytorch_model*.bin"


def _reporter(repo: str, progress: Progress) -> Any:
    """A tqdm class that draws nothing and tells `progress` of the bytes."""
    from tqdm.auto import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            with open(os.devnull, "w") as nowhere:
                super().__init__(*args, **{**kwargs, "file": nowhere, "disable": False, "mininterval": 1e9})
            self._report()

        def update(self, n: float | None = 1) -> Any:
            self.n += n or 0
            self._report()

        def _report(self) -> None:
            if self._counts_bytes and self.total:
                text = f"downloading {repo}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB"
                progress(text, min(1.0, self.n / self.total))

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            return

        def close(self) -> None:
            return

    return Reporter


def _explained(reference: str, download: Callable[[], Path]) -> Path:
    """The Hub's many errors as one line each."""
    from huggingface_hub import errors

    try:
        return download()
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{reference} is gated: accept its conditions on the Hub, then `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{reference} does not exist on the Hub, or is private: check the name, or log in with"
            " `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{reference}: the repository has no such revision") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelNotFoundError(
            f"{reference} is not complete in the Hugging Face cache, and the Hub cannot be asked (offline"
            " mode, or no network): run again online"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ModelNotFoundError(
                f"{reference}: the Hub refuses (HTTP {status}): log in with `hf auth login` or set HF_TOKEN"
            ) from error
        raise MobileError(f"{reference}: the Hub answered with HTTP {status}: try again later") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{reference} is no repository on the Hub: {error}") from error
    except OSError as error:
        if error.errno == 28:
            raise MobileError(
                f"{reference}: the disk of the Hugging Face cache is full (see HF_HOME)"
            ) from error
        raise MobileError(f"{reference} cannot be downloaded: {_first_line(error)}; try again") from error
    except MobileError:
        raise
    except Exception as error:  # httpx and its kin raise classes of their own, all of them about the network
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "hf_xet")):
            raise
        raise MobileError(
            f"{reference}: the Hub cannot be reached ({_first_line(error)}): try again, or with"
            " HF_HUB_OFFLINE=1 if the cache has it"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
