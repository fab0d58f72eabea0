"""A model's facts from the Hub without its weights: only the header's bytes are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.header import read_open_header
from mobile_gguf.gguf.info import GgufInfo, make_gguf_info
from mobile_gguf.progress import Progress
from mobile_gguf.sizes import MIB, format_bytes

from .client import Repository, open_range, retrying
from .explain import explained
from .pull import find_remote
from .reference import Reference
from .variants import RemoteFile

_BLOCK = 2 * MIB
# A header is mostly the vocabulary, some 10 MiB; a hostile one shall not cost the whole file.
_MOST = 256 * MIB


def read_remote_info(reference: Reference, progress: Progress) -> tuple[Reference, GgufInfo]:
    """What ``gguf_info.read_gguf_info`` says, of a model that was not pulled; and its exact reference.

    ``path`` and ``files`` are names on the Hub. Raises as ``pull`` does, and ModelFormatError.
    """
    repository, variant = find_remote(reference, progress)
    headers = []
    with explained(reference):
        for number, file in enumerate(variant.files):
            name = f"reading the header of {file.path}"
            share = number / len(variant.files)

            def tell(n_bytes: int, name: str = name, share: float = share) -> None:
                progress(f"{name}: {format_bytes(n_bytes)}", share)

            place = Path(str(Reference(reference.repo, file.path, revision=reference.revision)))
            headers.append(read_open_header(place, cast(BinaryIO, RangeFile(repository, file, tell))))
    exact = reference if reference.file else reference.of_quant(variant.quant)
    return exact if variant.quant else reference.of_file(variant.path), make_gguf_info(headers)


class RangeFile(io.RawIOBase):
    """A file on the Hub that is read by ranges, some megabytes at a time, and from its start to its end."""

    def __init__(self, repository: Repository, file: RemoteFile, tell: Callable[[int], None]) -> None:
        self._repository = repository
        self._file = file
        self._tell = tell
        self._position = 0
        self._start = 0
        self._block = b""
        self.n_fetched = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.n_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.n_bytes - self._position)
        wanted = left if size < 0 else min(size, left)
        parts = []
        while wanted:
            offset = self._position - self._start
            if not 0 <= offset < len(self._block):
                self._fetch()
                offset = 0
            part = self._block[offset : offset + wanted]
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return b"".join(parts)

    def _fetch(self) -> None:
        if self.n_fetched >= _MOST:
            raise ModelFormatError(
                f"{self._file.path} cannot be used: its header is larger than {_MOST} bytes"
            )
        start, stop = self._position, min(self._position + _BLOCK, self._file.n_bytes)

        def ask() -> bytes:
            with open_range(self._repository, self._file, start, stop) as (response, is_range):
                if not is_range:
                    raise ModelFormatError(
                        f"{self._repository.reference}: this Hub sends whole files only: pull it first"
                    )
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > stop - start:
                        break
                return bytes(data)

        block = retrying(ask, lambda _text: None)
        if len(block) != stop - start:
            raise ModelFormatError(
                f"{self._repository.reference}: the Hub sent another range than was asked for"
            )
        self._start, self._block = start, block
        self.n_fetched += len(block)
        self._tell(self.n_fetched)
