"""Models that say a given text: real files for the real engine, whose weights are written, not learned.

A state has one dimension for each token of the text, and one that all other tokens share, so that the output
head can name what comes next. Tokens that come twice, as control tokens do, are told apart by the one before
them, which a head of attention brings along; another head finds out whether a tool has answered. The
experts are random and weigh little. The vocabulary is the demo model's, with the marks of the template
and with the text in pieces, which come of that text again when it is part of a later prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray
LAYERS, EXPERTS, USED, N_FF, HEAD = 2, 8, 2, 32, 64
ROPE_BASE = 1e7
_PIECE = 7  # characters, at least
_SHARP = 10.0  # of queries and of keys: one place has all of the attention
# In the head: of the token before, of who came before that one, and of a tool's answer; that one says too
# little alone, and enough beside a part of the first.
_NEXT, _APART, _TOLD = 16.0, 24.0, 12.0
_START = -1  # what stands before a text
CUT = "\0"  # in a text: here ends a token, and another begins


@dataclass(frozen=True)
class Says:
    """What a model says, and how its prompts look.

    ``starts`` has a prompt's last token, and the part of ``first`` that the model begins with then. Where a
    tool has answered, known by the token ``told``, it says ``then`` instead: ``back`` tokens before the
    prompt's last one, or anywhere before it (0). ``controls`` and ``marks`` are tokens that the vocabulary is
    to have: control tokens, and such as are text. A text may hold ``CUT``.
    """

    template: str
    first: str
    starts: Mapping[str, str]
    end: str
    then: str = ""
    told: str = ""
    back: int = 0
    controls: Sequence[str] = ()
    marks: Sequence[str] = ()
    n_ctx: int = 32768


def write(path: Path, says: Says, demo: Path) -> Path:
    """Write the model; ``demo`` is the file that its vocabulary is of."""
    fields = gguf.GGUFReader(demo).fields
    base = {
        name: fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges", "pre")
    }
    words = _Words(base["tokens"], says)
    weights = _Weights(words, says)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("a model that says a given text")
    writer.add_block_count(LAYERS)
    writer.add_context_length(says.n_ctx)
    writer.add_embedding_length(weights.n_embd)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(base["pre"])
    writer.add_token_list(words.texts)
    writer.add_token_types([*base["token_type"], *words.kinds])
    writer.add_token_merges(base["merges"])
    writer.add_eos_token_id(words.end)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(says.template)
    for name, tensor in weights.tensors():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _of_bytes() -> dict[str, str]:
    """GPT-2's characters for bytes, and the bytes (as characters) that they stand for."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): chr(byte) for byte in shown} | {
        chr(256 + i): chr(byte) for i, byte in enumerate(others)
    }


class _Words:
    """The vocabulary: the demo's tokens, then those of the template, then the pieces of what is said.

    ``chain`` has what follows what: the token before, the token, the one after; ``starts`` the first tokens
    of what is said behind a prompt's last one.
    """

    def __init__(self, base: Sequence[str], says: Says) -> None:
        self.texts = list(base)
        self.kinds: list[int] = []
        byte_of = _of_bytes()
        self._ids = {}
        for i, text in enumerate(base):
            raw = "".join(byte_of.get(one, "?") for one in text)
            self._ids[raw.encode("latin-1").decode(errors="replace")] = i
        for text in says.controls:
            self.id(text, gguf.TokenType.CONTROL)
        for text in says.marks:
            self.id(text)
        self._marks = sorted({*says.controls, *says.marks, says.end}, key=len, reverse=True)
        self.end = self.id(says.end)
        self.told = self.id(says.told) if says.told else None
        first = self._pieces(says.first, says.starts.values())
        then = self._pieces(says.then, ())
        self.then = [*then.values()]
        self.starts = {self.id(last): first[says.first.index(part)] for last, part in says.starts.items()}
        self.chain = [*self._chained([*first.values()]), *self._chained(self.then)]

    def _chained(self, tokens: list[int]) -> Iterator[tuple[int, int, int]]:
        told = [_START, *tokens, self.end]
        return zip(told, told[1:], told[2:], strict=False)

    def id(self, text: str, kind: int = gguf.TokenType.USER_DEFINED) -> int:
        """A token's, which is made if there is none."""
        if text not in self._ids:
            self._ids[text] = len(self.texts)
            self.texts.append(text)
            self.kinds.append(kind)
        return self._ids[text]

    def _pieces(self, text: str, cuts: Any) -> dict[int, int]:
        """The tokens of a text that is to be said, by where they begin: marks, and pieces of its own."""
        ends = {0, len(text), *(text.index(part) for part in cuts)}
        ends |= {i for i, one in enumerate(text) if one == CUT}
        made: dict[int, int] = {}
        for begin, end in itertools.pairwise(sorted(ends)):
            at = begin + text.startswith(CUT, begin)
            while at < end:
                n = self._length(text[at:end])
                made[at] = self.id(text[at : at + n])
                at += n
        return made

    def _length(self, text: str) -> int:
        for mark in self._marks:
            if text.startswith(mark):
                return len(mark)
        until = min((text.index(mark) for mark in self._marks if mark in text), default=len(text))
        n = min(_PIECE, until)
        while n < until and text[:n] in self._ids:
            n += 1
        return until if until - n < _PIECE else n


class _Weights:
    """The tensors, of [rows, columns] as numpy has them."""

    def __init__(self, words: _Words, says: Says) -> None:
        self._words, self._back = words, says.back
        known = sorted({*(token for _, token, _ in words.chain), *words.starts})
        self._place = {token: i for i, token in enumerate(known)}
        after: dict[int, set[int]] = {}
        for _, token, follows in words.chain:
            after.setdefault(token, set()).add(follows)
        self._twice = {token for token, found in after.items() if len(found) > 1}
        before = sorted({one for one, token, _ in words.chain if token in self._twice})
        self._slot = {token: i for i, token in enumerate(before)}
        # all other tokens; a one; a tool's mark; and brought by attention, whether there was one
        self._other, self._one, self._mark, self._is_told = (len(known) + i for i in range(4))
        self._of_before = len(known) + 4
        self.n_embd = -(-(len(known) + 4 + HEAD) // 64) * 64
        if len(before) > HEAD:
            raise ValueError(f"{len(before)} tokens stand before others that come twice, at most {HEAD} may")

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """All of them, in the file's order."""
        n = self.n_embd
        yield "token_embd.weight", self._embeddings()
        yield "output_norm.weight", np.ones(n, np.float32)
        yield "output.weight", self._head()
        for layer in range(LAYERS):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", np.ones(n, np.float32)
            for name, tensor in self._attention(is_first=layer == 0).items():
                yield block + name, tensor
            yield block + "attn_q_norm.weight", np.full(HEAD, _SHARP, np.float32)
            yield block + "attn_k_norm.weight", np.full(HEAD, _SHARP, np.float32)
            yield block + "ffn_norm.weight", np.ones(n, np.float32)
            noise = np.random.default_rng(layer)
            yield block + "ffn_gate_inp.weight", noise.normal(0, 1, (EXPERTS, n)).astype(np.float32)
            for name, shape in (("gate", (N_FF, n)), ("up", (N_FF, n)), ("down", (n, N_FF))):
                values = noise.normal(0, 1e-3, (EXPERTS, *shape))
                yield f"{block}ffn_{name}_exps.weight", values.astype(np.float16)

    def _embeddings(self) -> Array:
        values = np.zeros((len(self._words.texts), self.n_embd), np.float16)
        values[:, self._one] = 1
        values[:, self._other] = 1
        for token, place in self._place.items():
            values[token, self._other] = 0
            values[token, place] = 1
        if self._words.told is not None:
            values[self._words.told, self._mark] = 1
        return values

    def _head(self) -> Array:
        words = self._words
        values = np.zeros((len(words.texts), self.n_embd), np.float16)
        values[words.end, self._other] = _NEXT
        for last, start in words.starts.items():
            values[start, self._place[last]] = _NEXT
            if words.then and words.then[0] != start:
                values[words.then[0], self._place[last]] = _TOLD
        for token in words.then[:1] if self._back else [*words.then, words.end]:
            values[token, self._is_told] = _TOLD
        for before, token, follows in words.chain:
            is_apart = token in self._twice and before != _START
            is_less = is_apart or (not self._back and follows in words.then)
            values[follows, self._place[token]] = _TOLD if is_less else _NEXT
            if is_apart:
                values[follows, self._of_before + self._slot[before]] = _APART
        return values

    def _attention(self, is_first: bool) -> dict[str, Array]:
        """Two heads: the first finds a tool's mark, the second the token before."""
        n, pairs = self.n_embd, HEAD // 2
        names = ("attn_q", "attn_k", "attn_v")
        query, key, value = (np.zeros((2, HEAD, n), np.float32) for _ in names)
        output = np.zeros((n, 2, HEAD), np.float32)
        speeds = ROPE_BASE ** (-np.arange(pairs) / pairs)  # radians a token, of each pair of dimensions

        def back(tokens: int) -> Array:
            """What a query is, next to a key of ones: the best match is so many tokens before it."""
            return np.concatenate([np.cos(speeds * tokens), -np.sin(speeds * tokens)])

        ones = np.concatenate([np.ones(pairs), np.zeros(pairs)])
        if is_first:
            query[0, :, self._one], key[0, :, self._one] = back(self._back), ones
            if not self._back:  # wherever it is: in the pair that hardly turns
                last = np.zeros(HEAD)
                last[pairs - 1] = 1
                query[0, :, self._one], key[0, :, self._one], key[0, :, self._mark] = last, -last, 2 * last
            query[1, :, self._one], key[1, :, self._one] = back(1), ones
            value[0, 0, self._mark] = 1
            output[self._is_told, 0, 0] = 1
            for token, slot in self._slot.items():
                if token != _START:
                    value[1, slot, self._place[token]] = 1
                    output[self._of_before + slot, 1, slot] = 1
        made = {
            f"{name}.weight": one.reshape(2 * HEAD, n)
            for name, one in zip(names, (query, key, value), strict=True)
        }
        made |= {"attn_output.weight": output.reshape(n, 2 * HEAD)}
        return {name: one.astype(np.float16) for name, one in made.items()}
