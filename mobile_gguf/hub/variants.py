"""The models in a repository: its GGUF files grouped into split models, their quantisations, the choice.

Pure: works on names and sizes, whether they come from the Hub or from the cache.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mobile_gguf.errors import ModelNotFoundError, UsageError
from mobile_gguf.sizes import format_bytes

from .reference import Reference

DEFAULT_QUANT = "Q4_K_M"
# Without a wish: four bits first, then what is near in size. As the tag is written, without a prefix.
_NEAREST = (
    "Q4_K_M", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "MXFP4", "MXFP4_MOE", "NVFP4", "IQ4_XS", "IQ4_NL", "Q4_K",
    "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_XL", "Q5_K_S", "Q5_0", "Q5_1", "Q3_K_L", "Q3_K_XL", "Q3_K_M", "IQ3_M",
    "Q6_K", "Q6_K_L", "Q6_K_XL", "Q3_K_S", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q8_0", "Q8_K_XL",
)  # fmt: skip
_FULL = ("BF16", "F16", "FP16", "F32")
_TAG = re.compile(
    r"(?:^|[-._/ ])((?:UD-|i1-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|FP16|F32))"
    r"(?=$|[-._/ ])",
    re.IGNORECASE,
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
# GGUFs that are no language model of their own
_BESIDE = re.compile(r"(?:^|[-_./])(?:mmproj|imatrix|ggml-vocab)(?:[-_./]|$)", re.IGNORECASE)
_LISTED = 24


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. ``etag``: its sha256 if it is stored by LFS or Xet, else git's sha1."""

    path: str
    n_bytes: int
    etag: str = ""

    @property
    def has_sha256(self) -> bool:
        return len(self.etag) == 64


@dataclass(frozen=True)
class Variant:
    """One model of a repository: its files in order, and the tag in their name (``""`` if there is none)."""

    quant: str
    files: tuple[RemoteFile, ...]
    n_parts: int = 1  # as the name of a split model says

    @property
    def path(self) -> str:
        """The first file, which stands for all."""
        return self.files[0].path

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def is_complete(self) -> bool:
        return len(self.files) == self.n_parts

    @property
    def plain(self) -> str:
        """The tag without a maker's prefix, in capitals."""
        return re.sub(r"^(UD|I1)-", "", self.quant.upper())


def find_variants(files: Iterable[RemoteFile]) -> list[Variant]:
    """The models among the files of a repository, by name; files of a split one are together."""
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = {}
    for file in files:
        if not file.path.lower().endswith(".gguf"):
            continue
        if match := _PART.fullmatch(file.path):
            groups.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = file
        else:
            groups.setdefault((file.path[: -len(".gguf")], 1), {})[1] = file
    found = []
    for (stem, count), parts in sorted(groups.items()):
        # the file's name counts, and a folder's only if that says nothing
        folder, _, name = stem.rpartition("/")
        tags = _TAG.findall(name) or _TAG.findall(folder)
        in_order = tuple(parts[number] for number in sorted(parts))
        found.append(Variant(tags[-1] if tags else "", in_order, count))
    return found


def models_among(variants: Iterable[Variant]) -> list[Variant]:
    """Without projectors, importance matrices and vocabularies."""
    return [variant for variant in variants if not _BESIDE.search(variant.path)]


def choose(reference: Reference, variants: list[Variant]) -> tuple[Variant, str]:
    """The variant that a reference means, and a note if that was our choice (``""`` if not).

    Raises ModelNotFoundError (no such one; what there is, with sizes), UsageError (several fit).
    """
    if reference.file:
        return _named(reference, variants), ""
    models = models_among(variants)
    if not models:
        raise ModelNotFoundError(f"{reference} holds no GGUF model: {_listed(variants) or 'no GGUF at all'}")
    if reference.quant:
        return _of_quant(reference, models), ""
    if len(models) == 1:
        return models[0], ""
    ranked = sorted(models, key=_rank)
    best = [model for model in ranked if _rank(model)[:2] == _rank(ranked[0])[:2]]
    if len(best) > 1:
        raise _several(reference, best)
    chosen = best[0]
    if chosen.plain == DEFAULT_QUANT:
        why = "the default"
    else:
        why = f"it has no {DEFAULT_QUANT}, and this is nearest"
    others = [model.quant or model.path for model in models if model is not chosen]
    return chosen, (
        f"{reference}: taking {chosen.quant or chosen.path} ({why}); also there: {_shortened(others)}"
    )


def describe(variant: Variant) -> str:
    """``Q4_K_M (17.28 GiB)``, with the number of files if it is split."""
    files = f" in {variant.n_parts} files" if variant.n_parts > 1 else ""
    return f"{variant.quant or variant.path} ({format_bytes(variant.n_bytes)}{files})"


def _named(reference: Reference, variants: list[Variant]) -> Variant:
    for variant in variants:
        if any(file.path == reference.file for file in variant.files):
            return variant
    # a file may be named without its folder, and by other capitals
    wanted = reference.file.lower()
    alike = [
        variant
        for variant in variants
        if any(wanted in (f.path.lower(), f.path.lower().rpartition("/")[2]) for f in variant.files)
    ]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise _several(reference, alike)
    bare = Reference(reference.repo, revision=reference.revision)
    near = difflib.get_close_matches(reference.file, [variant.path for variant in variants], 1)
    hint = (
        f"; did you mean {bare.of_file(near[0])}?" if near else f": {_listed(variants) or 'no GGUF at all'}"
    )
    raise ModelNotFoundError(f"{bare} has no file {reference.file}{hint}")


def _of_quant(reference: Reference, models: list[Variant]) -> Variant:
    wanted = reference.quant.upper()
    for fits in (
        lambda model: model.quant.upper() == wanted,
        lambda model: model.plain == wanted,
        lambda model: _stem(model).upper() == wanted,
    ):
        alike = [model for model in models if fits(model)]
        if len(alike) > 1:
            raise _several(reference, alike)
        if alike:
            return alike[0]
    tags = {model.quant.upper(): model.quant for model in models if model.quant}
    near = difflib.get_close_matches(wanted, tags, 1, 0.7)
    hint = f"; did you mean {tags[near[0]]}?" if near else "."
    bare = Reference(reference.repo, revision=reference.revision)
    raise ModelNotFoundError(f"{bare} has no {reference.quant}{hint} There is {_listed(models)}")


def _stem(model: Variant) -> str:
    name = model.path.rpartition("/")[2]
    match = _PART.fullmatch(name)
    return match["stem"] if match else name[: -len(".gguf")]


def _rank(model: Variant) -> tuple[int, int, str]:
    """Nearest to the default first; a tag with a prefix after the plain one; unknown ones by size."""
    plain = model.plain
    prefixed = int(plain != model.quant.upper())
    if plain in _NEAREST:
        return _NEAREST.index(plain), prefixed, model.path
    if plain in _FULL:
        return len(_NEAREST) + 1 + _FULL.index(plain), prefixed, model.path
    return len(_NEAREST), model.n_bytes, model.path


def _several(reference: Reference, alike: list[Variant]) -> UsageError:
    bare = Reference(reference.repo, revision=reference.revision)
    named = [f"{bare.of_file(model.path)} ({format_bytes(model.n_bytes)})" for model in alike]
    return UsageError(f"{reference} can mean {len(alike)} models, name one: {_shortened(named)}")


def _listed(variants: list[Variant]) -> str:
    return _shortened([describe(variant) for variant in sorted(variants, key=lambda v: (v.n_bytes, v.path))])


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
