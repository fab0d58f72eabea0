"""Transformers computing with a GGUF's arithmetic: torch in float32, operands rounded as the file has them.

llama.cpp multiplies an F16 or BF16 matrix by activations rounded to that type, products summed in float32.
A mode that sees every torch function does the same to Transformers, so that what is left between the two is
the order of summation, and a wrong tensor cannot hide behind rounding. Imports torch: for `verify_child`.
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
    torch.mm, torch.Tensor.mm,
}  # fmt: skip


def round_to(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """``tensor`` in float32, rounded to the type named ``kind`` if that is a 16-bit one."""
    if kind not in ROUNDED:
        return tensor.float()
    return tensor.to(ROUNDED[kind]).float()


class StoredPrecision(TorchFunctionMode):
    """Rounds the operands of every product with a parameter that is stored in 16 bits.

    Parameters may be in a type of their own (a checkpoint's bfloat16, where float32 does not fit): each is
    made float32 for the one product that it is in.
    """

    def __init__(self, model: torch.nn.Module, types: dict[str, str], *, activations: bool = True) -> None:
        super().__init__()
        self.activations = activations
        self.kinds: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            kind = types.get(name, "F32")
            self.kinds[parameter.untyped_storage().data_ptr()] = kind
            if parameter.dtype == torch.float32 and kind in ROUNDED:
                with torch.no_grad():
                    parameter.copy_(round_to(parameter, kind))

    def _kind(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        return self.kinds.get(value.untyped_storage().data_ptr())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) >= 2:
            kind = self._kind(args[0]) or self._kind(args[1])
            if kind is not None:
                own = [self._kind(value) is not None for value in args[:2]]
                operands = [
                    round_to(value, kind) if mine or self.activations else value
                    for value, mine in zip(args[:2], own, strict=True)
                ]
                # a bias, too, may be in the checkpoint's own type
                rest = [value.float() if isinstance(value, torch.Tensor) else value for value in args[2:]]
                return func(*operands, *rest, **kwargs)
        elif func is _F.embedding:
            return func(*args, **kwargs).float()
        return func(*args, **kwargs)
