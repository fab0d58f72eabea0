"""The replay model as text: one character is one step of the trace, so that any engine's own command runs it.

A SentencePiece vocabulary in which token id s is the s-th character from U+4E00 on, with no merges: every
character is a token of its own. The bytes and the special tokens that engines look for come behind them. The
output head names the next step, and the end of text after the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import UsageError

from .trace import Trace

FIRST_CHARACTER = 0x4E00  # of the unified ideographs, none of which Unicode normalises
N_CHARACTERS = 0x9FFF - FIRST_CHARACTER + 1
SPECIAL = ("<unk>", "<s>", "</s>")
SPARE_TOKENS = len(SPECIAL) + 256  # behind the steps


def characters(first: int, n: int) -> str:
    """The text of ``n`` steps."""
    return "".join(map(chr, range(FIRST_CHARACTER + first, FIRST_CHARACTER + first + n)))


def prompt_text(trace: Trace) -> str:
    """What to give an engine as prompt, without a template around it."""
    return characters(0, trace.n_prompt)


def add_tokenizer(writer: Any, n_steps: int) -> None:
    """The metadata of a vocabulary for ``n_steps`` steps. Raises UsageError beyond N_CHARACTERS."""
    import gguf

    if n_steps > N_CHARACTERS:
        raise UsageError(f"a trace of {n_steps} steps: there are characters for {N_CHARACTERS}")
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*characters(0, n_steps), *SPECIAL, *of_bytes])
    writer.add_token_scores([0.0] * (n_steps + SPARE_TOKENS))
    writer.add_token_types(
        [kinds.NORMAL] * n_steps
        + [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * len(of_bytes)
    )
    unknown, begin, end = range(n_steps, n_steps + len(SPECIAL))
    writer.add_unk_token_id(unknown)
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def output_matrix(n_steps: int, n_vocab: int, n_embd: int, right: float = 1.0) -> npt.NDArray[np.float32]:
    """The head [n_vocab, n_embd]: of a normalised one-hot state it gives sqrt(n_embd) to the next step.

    Of a share ``right`` of the steps; behind the others it leaves one out, so that who guesses the next step
    is right so often.
    """
    matrix = np.zeros((n_vocab, n_embd), dtype=np.float32)
    following = np.arange(1, n_steps + 1)
    leaves_out = np.random.default_rng(n_steps).random(n_steps) >= right
    following[:-2] += leaves_out[:-2]
    following[-1] = n_steps + SPECIAL.index("</s>")
    matrix[following, np.arange(n_steps)] = 1.0
    return matrix
