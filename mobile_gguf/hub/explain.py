"""The Hub's many errors as one line each, and which of them are worth another try."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mobile_gguf.errors import MobileError, ModelNotFoundError, UsageError
from mobile_gguf.files.atomic import disk_errors

from .reference import Reference

# also: other libraries' classes for a connection that failed, which no error of the Hub wraps
_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "hf_xet")
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
OFFLINE = "HF_HUB_OFFLINE"


class HubError(MobileError):
    """The Hub cannot be reached, or refuses for now."""


def is_offline() -> bool:
    """Whether the environment forbids asking the Hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in (OFFLINE, "TRANSFORMERS_OFFLINE")
    )


def endpoint() -> str:
    """The Hub's address, ``$HF_ENDPOINT`` if that is set."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_network_error(error: BaseException) -> bool:
    """Whether a connection failed (no route, cut, timed out), as opposed to an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return type(error).__module__.startswith(_NETWORK) and not isinstance(error, HfHubHTTPError)


def is_worth_a_retry(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    return is_network_error(error) or status_of(error) in _RETRIED


def status_of(error: BaseException) -> int:
    """The HTTP status that an error came with, 0 if none."""
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def retry_after(error: BaseException) -> float | None:
    """Seconds the Hub asks to wait: ``Retry-After``, or the reset time ``t`` of the ``RateLimit`` header."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    if not value.isdigit():
        fields = dict(part.strip().partition("=")[::2] for part in headers.get("RateLimit", "").split(";"))
        value = fields.get("t", "").strip()
    return float(value) if value.isdigit() else None


@contextmanager
def explained(reference: Reference) -> Iterator[None]:
    """Raise what goes wrong in the block as a MobileError that names ``reference`` and says what to do."""
    from huggingface_hub import errors

    page = f"{endpoint()}/{reference.repo}"
    try:
        yield
    except MobileError:
        raise
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{reference} is gated: accept its conditions at {page}, then `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{reference} does not exist on the Hub, or is private: check the name, or log in with"
            " `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{reference}: the repository has no such revision, {reference.wanted_revision}: see {page}"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise offline_error(reference) from error
        raise ModelNotFoundError(f"{reference}: the repository has no such file: see {page}") from error
    except errors.OfflineModeIsEnabled as error:
        raise offline_error(reference) from error
    except errors.HfHubHTTPError as error:
        raise _refused(reference, error) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{reference} is no repository on the Hub: {first_line(error)}") from error
    except ImportError as error:
        # the HTTP client's, when the environment names a SOCKS proxy and the package for that is missing
        if "socksio" not in str(error):
            raise
        raise HubError(
            f"{reference}: {_socks_variable()} is a SOCKS proxy, which needs the package socksio:"
            " `pip install socksio`, or unset it"
        ) from error
    except Exception as error:
        if is_network_error(error):
            raise HubError(
                f"{reference}: the Hub cannot be reached ({first_line(error)}): check the connection and try"
                f" again, or set {OFFLINE}=1 to use only what was pulled"
            ) from error
        raise


def _socks_variable() -> str:
    """The environment's variable that names a SOCKS proxy."""
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        for spelled in (name, name.lower()):
            if os.environ.get(spelled, "").lower().startswith("socks"):
                return spelled
    return "the system's proxy"


def offline_error(reference: Reference) -> ModelNotFoundError:
    """For what is not in the cache while the Hub must not be asked."""
    return ModelNotFoundError(
        f"{reference} is not complete in the Hugging Face cache, and the Hub must not be asked (offline"
        f" mode, {OFFLINE}): unset that and run `mobile-gguf pull {reference}`"
    )


def _refused(reference: Reference, error: Exception) -> MobileError:
    status = status_of(error)
    if status in (401, 403):
        return ModelNotFoundError(
            f"{reference}: the Hub refuses (HTTP {status}): log in with `hf auth login`, or set HF_TOKEN to a"
            " token that may read it"
        )
    if status == 429:
        pause = retry_after(error)
        wait = f"in {pause:.0f} s" if pause is not None else "in some minutes"
        return HubError(
            f"{reference}: the Hub limits how often it answers (HTTP 429): try again {wait}; with HF_TOKEN"
            " the limit is higher"
        )
    if status == 404:
        return ModelNotFoundError(f"{reference} does not exist on the Hub (HTTP 404): check the name")
    return HubError(f"{reference}: the Hub answered with HTTP {status}: try again later")


@contextmanager
def cache_disk_errors(path: os.PathLike[str]) -> Iterator[None]:
    """Turn the disk's refusals in the block into one line that names HF_HOME."""
    from pathlib import Path

    with disk_errors(Path(path), remedy=", or set HF_HOME to another disk"):
        yield


def first_line(error: BaseException) -> str:
    """What an error says, shortened to a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
