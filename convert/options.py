"""What can be said about a conversion, declared once for the command line and the Python API."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from mobile_gguf.errors import UsageError
from mobile_gguf.options import Opt

SEGMENT_ORDERS = ("importance", "natural")
MAX_SEGMENTS = 64


def read_tensor_type(text: str) -> tuple[str, str]:
    """Read ``PATTERN=TYPE``. Raises UsageError."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern or not type_name:
        raise UsageError(f"{text!r} is no PATTERN=TYPE, such as ffn_down_exps=q6_k")
    return pattern, type_name


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How a model is converted. What only concerns quantising is refused for an input that is a GGUF."""

    outtype: Annotated[
        str, Opt("--outtype", help="type of the result: auto, f32, f16, bf16, q8_0, q4_k_m, ...")
    ] = "auto"
    experts: Annotated[
        str | None, Opt("--experts", help="type of the routed experts, where it is to differ, such as q4_k")
    ] = None
    attention: Annotated[
        str | None, Opt("--attention", help="type of the attention matrices, such as q8_0")
    ] = None
    tensor_types: Annotated[
        tuple[tuple[str, str], ...],
        Opt(
            "--tensor-type",
            read=read_tensor_type,
            metavar="PATTERN=TYPE",
            repeated=True,
            help="type of the tensors whose names match; may be given more than once",
        ),
    ] = ()
    imatrix: Annotated[
        Path | None, Opt("--imatrix", read=Path, help="importance matrix for the quantiser, a file")
    ] = None
    pure: Annotated[bool, Opt("--pure", is_flag=True, help="quantise all tensors to the same type")] = False
    segments: Annotated[
        int,
        Opt("--segments", read=int, low=1, high=MAX_SEGMENTS, help="cut every expert into so many parts"),
    ] = 1
    segment_order: Annotated[
        str,
        Opt(
            "--segment-order",
            choices=SEGMENT_ORDERS,
            help="which neurons stand in the first segment: the most important, or the first",
        ),
    ] = "importance"
    stacked: Annotated[
        bool, Opt("--stacked", is_flag=True, help="leave a layer's experts in one tensor, as stock files do")
    ] = False
    export: Annotated[
        bool, Opt("--export", is_flag=True, help="turn a file of ours back into a stock one")
    ] = False
    verify: Annotated[
        bool | None, Opt(help="compare the result with Transformers (default: when torch is installed)")
    ] = None
    keep_intermediate: Annotated[
        bool, Opt("--keep-intermediate", is_flag=True, help="keep the file that was quantised")
    ] = False
    dry_run: Annotated[
        bool, Opt("--dry-run", is_flag=True, help="show what would be done, write nothing")
    ] = False
    force: Annotated[bool, Opt("--force", is_flag=True, help="overwrite an existing output")] = False
    pre_tokenizer: Annotated[
        str | None,
        Opt("--pre-tokenizer", help="how llama.cpp splits text, where the tokenizer is none that it knows"),
    ] = None
    trust_remote_code: Annotated[
        bool,
        Opt("--trust-remote-code", is_flag=True, help="let Python files of the checkpoint run"),
    ] = False
    no_mtp: Annotated[
        bool,
        Opt(
            "--no-mtp",
            is_flag=True,
            help="leave out the blocks that predict several tokens, of use for drafts",
        ),
    ] = False
    threads: Annotated[
        int | None, Opt("-t", "--threads", read=int, low=1, help="threads that quantise (default: the cores)")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """What a conversion wrote, or with ``dry_run`` would write.

    ``n_bytes`` is the output's size, ``peak_disk_bytes`` what the disk must have free for all files that
    exist at once, ``free_bytes`` what it had. ``verification`` is "passed", "failed" or None (not verified),
    ``rows`` is more for people, name and value. ``exit_code`` is what the command ends with.
    """

    path: Path
    source: str
    layout: str  # "per-expert" or "stacked"
    segments: int
    n_tensors: int
    n_bytes: int
    peak_disk_bytes: int
    free_bytes: int
    seconds: float = 0.0
    dry_run: bool = False
    verification: str | None = None
    rows: tuple[tuple[str, str], ...] = ()
    details: dict[str, Any] | None = None  # more for --json
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        shown: dict[str, Any] = asdict(self) | {"path": str(self.path)}
        details = shown.pop("details") or {}
        del shown["rows"], shown["exit_code"]
        return shown | details
