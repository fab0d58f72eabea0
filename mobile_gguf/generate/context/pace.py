"""A token that is generated alone, timed for what follows the machine: threads, a device's own trials.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llama_cpp import llama_cpp

from mobile_gguf.memory.competition import Competition

from .threads import FollowingThreads

if TYPE_CHECKING:
    from ..llama import MobileLlama
    from .sequence import TokenSequence


def follow_machine(llama: MobileLlama) -> None:
    """Generate with fewer threads while others want the processors.

    Not with flash attention, which adds up in another order with another number: a seed must
    give one text. Nor with a device, whose own trials compare times.
    """
    native, limit = llama.native, llama.native.n_threads
    if limit > 1 and not native.flash_attn and not llama.devices:
        llama.threads = FollowingThreads(limit, native.set_threads, Competition())
        llama.scheduler.threads = llama.threads


def run_token(llama: MobileLlama, sequence: TokenSequence, token: int) -> None:
    """Run a generated token; beside others it is not timed, for what it takes is theirs as well."""
    if llama.scheduler.n_running > 1:
        sequence.run_token(token)
    elif llama.threads is not None:
        llama.threads.before()
        sequence.run_token(token)
        llama.threads.after()
    elif llama.device is not None:
        llama.device.controller.before_step(sequence.policy.mode)
        started = time.perf_counter()
        sequence.run_token(token)
        llama_cpp.llama_synchronize(llama.ctx)
        llama.device.controller.after_step(time.perf_counter() - started)
    else:
        sequence.run_token(token)
