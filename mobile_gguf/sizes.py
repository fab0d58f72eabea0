"""Byte sizes as people write them: ``512MiB``, ``2G``, ``40%``, ``auto``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

from .errors import UsageError, shown

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# As in GNU coreutils: K and KiB are powers of 1024, KB is a power of 1000.
_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "ki": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mi": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gi": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "ti": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_WRITE = "write bytes, 512MiB, 2G, 40% or auto"
_MAX_BYTES = 1 << 63
_FEW_MEBIBYTES = 64 * MIB
_PATTERN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*|%)")


@dataclass(frozen=True)
class Size:
    """A byte count, a share of something not yet known, or ``auto`` (both None).

    ``n_bytes`` is in bytes, ``fraction`` in (0, 1].
    """

    n_bytes: int | None = None
    fraction: float | None = None

    @property
    def is_auto(self) -> bool:
        return self.n_bytes is None and self.fraction is None

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.fraction * 100:g}%"
        return "auto" if self.n_bytes is None else format_bytes(self.n_bytes)


AUTO = Size()
OFF: Final = "off"


def parse_size(value: str | int | Size) -> Size:
    """Read a size: bytes as an int, ``512MiB``, ``2G``, ``2GB`` (10^9), ``40%`` or ``auto``.

    Raises UsageError for anything else, for zero and for shares above 100%.
    """
    if isinstance(value, Size):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_bytes(value, value)
    if not isinstance(value, str):
        raise UsageError(f"{shown(value)} is not a size: {_WRITE}")
    return parse_text(value)


def parse_text(value: str) -> Size:
    """Read the text of a size, as ``parse_size`` does. Raises UsageError."""
    text = value.strip()
    if text.lower() == "auto":
        return AUTO
    match = _PATTERN.fullmatch(text)
    if match is None or (match[2] != "%" and match[2].lower() not in _UNITS):
        raise UsageError(f"{shown(value)} is not a size: {_WRITE}")
    number = float(match[1])
    if match[2] == "%":
        if not 0 < number <= 100:
            raise UsageError(f"{shown(value)} is not a share: write more than 0% and at most 100%")
        # in decimals, as size_flag: 0.65 / 100 is a little more than 0.0065
        return Size(fraction=float(Decimal(match[1]) / 100))
    return _in_bytes(number * _UNITS[match[2].lower()], value)


def _in_bytes(number: int | float, given: str | int) -> Size:
    if not number < _MAX_BYTES:
        raise UsageError(f"{shown(given)} is not a size: the number is too large")
    if number < 1:
        raise UsageError(f"{shown(given)} is not a size: write at least one byte")
    return Size(n_bytes=int(number))


def parse_size_or_off(value: str | int | Size) -> Size | Literal["off"]:
    """Read a size, or ``off``, which comes back as it is; raises UsageError for anything else."""
    if isinstance(value, str) and value.strip().lower() == OFF:
        return OFF
    try:
        return parse_size(value)
    except UsageError as error:
        raise UsageError(f"{error}, or off") from None


def parse_bytes_or_off(value: str | int | Size) -> Size | Literal["off"]:
    """The same without shares, for what is a part of nothing. Raises UsageError."""
    size = parse_size_or_off(value)
    if isinstance(size, Size):
        _refuse_share(size, "bytes, auto or off")
    return size


def parse_bytes(value: str | int | Size) -> Size:
    """Read a size that is no share, or ``auto``. Raises UsageError."""
    size = parse_size(value)
    _refuse_share(size, "bytes or auto")
    return size


def _refuse_share(size: Size, way_out: str) -> None:
    if size.fraction is not None:
        raise UsageError(f"{size} is a share, and there is nothing that it is one of: give {way_out}")


def format_bytes(n_bytes: int | float) -> str:
    """Bytes for people, in binary units: ``512 B``, ``12.3 MiB``, ``2.00 GiB``."""
    for unit, name, digits in ((TIB, "TiB", 2), (GIB, "GiB", 2), (MIB, "MiB", 1), (KIB, "KiB", 1)):
        if abs(n_bytes) >= unit:
            return f"{n_bytes / unit:.{digits}f} {name}"
    return f"{int(n_bytes)} B"


def mebibytes(n_bytes: int, *, up: bool = False) -> str:
    """A size as a flag takes it, in whole MiB, or KiB where these are few; rounded down unless ``up``."""
    rounded = -whole_mebibytes(-n_bytes) if up else whole_mebibytes(n_bytes)
    unit, name = (MIB, "MiB") if n_bytes >= _FEW_MEBIBYTES else (KIB, "KiB")
    return f"{rounded // unit}{name}"


def whole_mebibytes(n_bytes: int) -> int:
    """Bytes rounded down to whole MiB, or KiB where these are few."""
    unit = MIB if abs(n_bytes) >= _FEW_MEBIBYTES else KIB
    return n_bytes // unit * unit


def size_flag(size: Size) -> str:
    """A size as a flag takes it, to the byte: ``parse_size`` makes the same of it again."""
    if size.n_bytes is not None:
        for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if size.n_bytes % unit == 0:
                return f"{size.n_bytes // unit}{name}"
        return str(size.n_bytes)
    if size.fraction is None:
        return "auto"
    # in decimals: as a float 0.07 * 100 is a little more than 7
    return f"{(Decimal(repr(size.fraction)) * 100).normalize():f}%"
