"""How many tokens a text has at least, by its bytes alone: what cannot fit is refused before it costs.

Making tokens of a text takes some 70 bytes of memory for each of its own, and a word of megabytes takes
minutes. A vocabulary tells without: no token holds more than so many bytes, nor more than so many of a kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

_CHUNK = 4096  # tokens that are looked at together
_COUNTED_BYTES = 1 << 17  # of which bincount makes eight times as many
_SPACE = (9, 10, 11, 12, 13, 32)
# Where the tokenizer changes a text before it reads it, any word may become one token of it.
_CHANGED_BYTES = 64


class TextLimit:
    """The most bytes of a vocabulary's tokens, of all kinds together and of each kind.

    ``is_verbatim`` if its tokens' bytes are those of the text, all of them.
    """

    def __init__(self, pieces: Iterable[bytes], is_verbatim: bool) -> None:
        longest = 1
        most = np.zeros(256, dtype=np.int64)
        alone = np.zeros(256, dtype=bool)
        pieces = iter(pieces)
        while chunk := list(islice(pieces, _CHUNK)):
            lengths = np.fromiter(map(len, chunk), dtype=np.int64, count=len(chunk))
            longest = max(longest, int(lengths.max()))
            if not is_verbatim:
                continue
            alone[[piece[0] for piece in chunk if len(piece) == 1]] = True
            owners = np.repeat(np.arange(len(chunk)), lengths)
            counts = np.bincount(
                owners * 256 + np.frombuffer(b"".join(chunk), dtype=np.uint8), minlength=256 * len(chunk)
            )
            most = np.maximum(most, counts.reshape(-1, 256).max(axis=0))
        self.longest = longest if is_verbatim else max(longest, _CHANGED_BYTES)
        # White space is dropped beside some control tokens; a byte that is no token of its own may be lost.
        most[~alone] = 0
        most[list(_SPACE)] = 0
        # a character that is in no token may become one "unknown" of up to four bytes
        self._most = np.where(most > 0, np.maximum(most, 4), 0)

    def least_tokens(self, text: bytes) -> int:
        """Tokens that ``text`` has at least."""
        least = -(-len(text) // self.longest)
        counted = np.zeros(256, dtype=np.int64)
        for start in range(0, len(text), _COUNTED_BYTES):
            part = np.frombuffer(text, np.uint8, min(_COUNTED_BYTES, len(text) - start), start)
            counted += np.bincount(part, minlength=256)
        kinds = self._most > 0
        if kinds.any():
            least = max(least, int(np.ceil(counted[kinds] / self._most[kinds]).max()))
        return least

    def most_bytes(self, n_tokens: int) -> int:
        """Bytes of the longest text that ``n_tokens`` may be of."""
        return n_tokens * self.longest
