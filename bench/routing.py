"""Checks that a built model routes as its trace says, by reading the ids back from the running engine."""

from __future__ import annotations

from mobile_gguf.errors import EngineError

from .arm import Arm, Runner
from .trace import Trace

DECODED = 4

Recorded = list[tuple[int, list[list[int]]]]


def check_routing(runner: Runner, trace: Trace, system: str) -> int:
    """Run the prompt and a few tokens, compare every routed id; returns how many sets were compared.

    Raises EngineError naming the first difference.
    """
    n_decode = min(DECODED, trace.n_decode)
    arm = Arm(system, "exact", "100%", 0, 1 << 60, resident=True)
    return compare_routing(trace, runner.routed_ids(arm, n_decode), [trace.n_prompt] + [1] * n_decode)


def compare_routing(trace: Trace, recorded: Recorded, passes: list[int]) -> int:
    """Compare recorded (layer, ids of the pass's tokens) with the trace; ``passes`` are tokens a pass.

    A layer may have computed only a pass's last tokens, as the last layer does in a prompt.
    """
    if len(recorded) != len(passes) * trace.n_layer:
        raise EngineError(
            f"the engine routed {len(recorded)} times, expected {len(passes)} passes x {trace.n_layer} layers"
        )
    n_compared = end = 0
    for number, n_tokens in enumerate(passes):
        end += n_tokens
        for layer, rows in recorded[number * trace.n_layer : (number + 1) * trace.n_layer]:
            for step, ids in enumerate(rows, start=end - len(rows)):
                wanted = trace.experts[step, layer].tolist()
                if wanted[0] >= 0 and ids != wanted:
                    raise EngineError(
                        f"the model does not follow the trace: step {step}, layer {layer} "
                        f"routed {ids}, not {wanted}"
                    )
                n_compared += 1
    return n_compared
