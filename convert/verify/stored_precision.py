"""Transformers with a GGUF's weights: float32 arithmetic, each parameter rounded to the type the file has.

So what is left between Transformers and the engine is the order of summation, and a wrong tensor cannot hide
behind rounding. A mode that sees every torch function also notes what the routers chose. Imports torch: for
``child``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROUNDED = {"F16": torch.float16, "BF16": torch.bfloat16}

_F = torch.nn.functional
_PRODUCTS = {
    _F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
    torch.mm, torch.Tensor.mm, _F.conv1d, torch.conv1d, torch.baddbmm,
}  # fmt: skip
_TOP_K = {torch.topk, torch.Tensor.topk}


class Routing:
    """What routers chose, and how clearly: every top-k of a forward pass is seen."""

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []
        self.margins: list[torch.Tensor] = []

    def record(self, scores: torch.Tensor, indices: torch.Tensor) -> None:
        """Keep one choice among ``scores`` [..., n]; a choice of all of them is none."""
        k = indices.shape[-1]
        if scores.shape[-1] <= k:
            return
        best = scores.float().topk(k + 1, dim=-1).values
        size = best.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.margins.append((best[..., k - 1] - best[..., k]) / size)
        self.chosen.append(indices)

    def smallest_margins(self, n_tokens: int) -> list[float]:
        """Per token, the smallest lead of a chosen expert over the next one, as a share of the best score."""
        rows = [each.reshape(n_tokens, -1).amin(1) for each in self.margins if each.numel() % n_tokens == 0]
        return torch.stack(rows).amin(0).tolist() if rows else [1.0] * n_tokens

    def experts(self, n_expert_used: int) -> set[tuple[int, int]]:
        """(router, expert) of all choices of ``n_expert_used``, routers counted in the order they ran."""
        routers = [each for each in self.chosen if each.shape[-1] == n_expert_used and each.ndim == 2]
        return {(layer, int(expert)) for layer, each in enumerate(routers) for expert in each.unique()}


def round_to(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """``tensor`` in float32, rounded to the type named ``kind`` if that is a 16-bit one."""
    if kind not in ROUNDED:
        return tensor.float()
    return tensor.to(ROUNDED[kind]).float()


class NarrowedError(Exception):
    """Float32 activations were made 16-bit ones, so that the computation is no float32 reference."""


def _is_narrowed(result: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(result, torch.Tensor) or result.dtype not in ROUNDED.values():
        return False
    return any(isinstance(each, torch.Tensor) and each.dtype == torch.float32 for each in args)


class StoredPrecision(TorchFunctionMode):
    """Computes in float32 with parameters rounded as ``types`` (parameter name -> GGUF type) says.

    Float32 parameters are rounded once, in place. Where float32 does not fit, parameters stay in the
    checkpoint's own type, and each is widened and rounded for the one product that it is in.
    """

    def __init__(self, model: torch.nn.Module, types: dict[str, str]) -> None:
        super().__init__()
        self.routing = Routing()
        self.kinds: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            kind = types.get(name, "F32")
            if parameter.dtype != torch.float32:
                self.kinds[parameter.untyped_storage().data_ptr()] = kind
            elif kind in ROUNDED:
                with torch.no_grad():
                    parameter.copy_(round_to(parameter, kind))

    def _widened(self, value: Any) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype == torch.float32
            or not value.is_floating_point()
        ):
            return value
        return round_to(value, self.kinds.get(value.untyped_storage().data_ptr(), "F32"))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            kwargs = {name: self._widened(value) for name, value in kwargs.items()}
            return func(*(self._widened(value) for value in args), **kwargs)
        result = func(*args, **kwargs)
        if func is _F.embedding:
            return self._widened(result) if len(args) < 2 else self._embedded(args[1], result)
        if func in _TOP_K:
            self.routing.record(args[0], result.indices)
        elif _is_narrowed(result, args):
            raise NarrowedError("this family rounds its activations to the type of its weights")
        return result

    def _embedded(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding table, as that table is stored."""
        if rows.dtype == torch.float32:
            return rows
        return round_to(rows, self.kinds.get(table.untyped_storage().data_ptr(), "F32"))
