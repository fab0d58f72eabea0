"""What people write for a model on the Hub, read into one form: ``hf:org/repo[/file][:quant][@revision]``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from mobile_gguf.errors import UsageError

PREFIX = "hf:"
FORMS = "hf:ORG/REPO, hf:ORG/REPO:QUANT or hf:ORG/REPO/FILE.gguf, each with @REVISION if need be"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_REFERENCE = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<before>[\w./-]+))?"
    r"(?:/(?P<file>[^:@]+))?"
    r"(?::(?P<quant>[\w.-]+))?"
    r"(?:@(?P<after>[\w./-]+))?"
)
_OTHER_KINDS = {"datasets": "a data set", "spaces": "a Space", "collections": "a collection"}


@dataclass(frozen=True)
class Reference:
    """A model on the Hub; ``quant`` and ``file`` are alternatives, both empty where the choice is open."""

    repo: str
    file: str = ""
    quant: str = ""
    revision: str = ""

    @property
    def name(self) -> str:
        """The last part of the repository's name."""
        return self.repo.partition("/")[2]

    @property
    def wanted_revision(self) -> str:
        return self.revision or "main"

    def of_file(self, file: str) -> Reference:
        """The same repository and revision, one file."""
        return replace(self, file=file, quant="")

    def of_quant(self, quant: str) -> Reference:
        """The same repository and revision, one quantisation."""
        return replace(self, file="", quant=quant)

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        quant = f":{self.quant}" if self.quant else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{file}{quant}{revision}"


def is_reference(text: str) -> bool:
    """True for what can only mean the Hub: ``hf:...`` or an address on it."""
    return text.startswith((PREFIX, "hf.co/", "huggingface.co/", "https://", "http://"))


def looks_like_repository(text: str) -> bool:
    """True for a bare ``org/repo``, with or without ``:quant``."""
    repo = text.partition(":")[0]
    return _REPO.fullmatch(repo) is not None and not repo.endswith((".gguf", "."))


def parse_reference(text: str) -> Reference:
    """Read a reference; an address copied from the browser and a bare ``org/repo`` are understood too.

    Raises UsageError that says what it should look like.
    """
    text = text.strip()
    if text.startswith(("https://", "http://")):
        return _from_address(text)
    for host in _HOSTS:
        if text.startswith(f"{host}/"):
            return _from_address(f"https://{text}")
    body = text.removeprefix("hf://").removeprefix(PREFIX)
    match = _REFERENCE.fullmatch(body)
    if match is None:
        raise _not_one(text, body)
    if match["before"] and match["after"]:
        raise UsageError(f"{text!r} names two revisions: write {FORMS}")
    reference = Reference(
        match["repo"], match["file"] or "", match["quant"] or "", match["before"] or match["after"] or ""
    )
    return _checked(text, reference)


def _checked(text: str, reference: Reference) -> Reference:
    parts = reference.file.split("/") if reference.file else []
    if any(part in ("", ".", "..") for part in [*parts, *(reference.revision or "x").split("/")]):
        raise UsageError(f"{text!r} is no model on the Hub: write {FORMS}")
    if ".." in reference.repo or "--" in reference.repo:
        raise UsageError(f"{text!r} is no repository's name: write {FORMS}")
    if reference.file and reference.quant:
        raise UsageError(f"{text!r} names a file and a quantisation: write {FORMS}")
    if reference.quant.lower().endswith(".gguf"):
        raise UsageError(f"{text!r} names a file after a colon: write {reference.of_file(reference.quant)}")
    if reference.file and not reference.file.lower().endswith(".gguf"):
        bare = Reference(reference.repo, revision=reference.revision)
        raise UsageError(f"{text!r} names no GGUF file: write {bare}, {bare}:Q4_K_M or {bare}/FILE.gguf")
    return reference


def _from_address(text: str) -> Reference:
    """https://huggingface.co/org/repo[/blob|resolve|tree/revision[/file]]; also ``hf.co/org/repo:quant``."""
    address = urlsplit(text)
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if address.netloc.lower() not in (*_HOSTS, own.lower()):
        raise UsageError(f"{text!r} is not on the Hugging Face Hub: download the file and give its path")
    parts = [unquote(part) for part in address.path.split("/") if part]
    if parts and parts[0] in _OTHER_KINDS:
        raise UsageError(f"{text!r} is {_OTHER_KINDS[parts[0]]}, not a model: write {FORMS}")
    if len(parts) < 2:
        raise _not_one(text, "/".join(parts))
    repo, _, quant = "/".join(parts[:2]).partition(":")
    rest, file, revision = parts[2:], "", ""
    if rest and rest[0] in ("blob", "resolve", "tree", "raw") and len(rest) > 1:
        if rest[1] == "refs" and len(rest) > 3:  # refs/pr/7
            revision, rest = "/".join(rest[1:4]), rest[4:]
        else:
            revision, rest = rest[1], rest[2:]
        # of a folder's address only the repository can be used
        file = "/".join(rest) if rest and rest[-1].lower().endswith(".gguf") else ""
    if not _REPO.fullmatch(repo):
        raise _not_one(text, repo)
    return _checked(text, Reference(repo, file, quant, "" if revision == "main" else revision))


def _not_one(text: str, body: str) -> UsageError:
    name = re.sub(r"\s", "", body.partition(":")[0].partition("@")[0])
    if name and "/" not in name:
        return UsageError(
            f"{text!r} is no repository on the Hub: the organisation is missing, write hf:ORG/{name}"
        )
    return UsageError(f"{text!r} is no repository on the Hub: write {FORMS}")
