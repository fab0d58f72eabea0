"""Some rows of a lazy tensor of the pinned converter, without computing the rest of it.

The converter describes each output tensor as a graph (its ``gguf.LazyBase``: a function and its arguments);
evaluated as it stands, stacking the experts of a layer holds several copies of all of them. Here the slice
goes down the graph instead: through operations that treat every row of the leading axis alike (element-wise
ones, slices and transposes of the other axes, quantisation of rows), to the experts of a stack and to the
bytes of a file. Anything else is evaluated whole, as upstream does: the result is always the same.

Runs where the pinned converter and its ``gguf`` lead the path (``upstream_child``); imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# one input, every element by itself
_ELEMENTWISE = frozenset(
    {
        *("to", "float", "half", "bfloat16", "double", "int", "type", "astype", "numpy", "cpu"),
        *(
            "contiguous",
            "clone",
            "detach",
            "abs",
            "neg",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "square",
            "reciprocal",
        ),
        *("sigmoid", "tanh", "__neg__", "__pos__", "__abs__", "__invert__"),
    }
)
_BINARY = frozenset(
    f"{under}{prefix}{name}{under}"
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "mod",
    ]
    for prefix in ("", "r")
    for under in ("", "__")
) | {"bitwise_and", "bitwise_or", "multiply", "subtract", "true_divide"}
_RESHAPES = frozenset({"view", "reshape"})
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_SPLITS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split"})
_STACKS = frozenset({"stack"})
_CATS = frozenset({"cat", "concat", "concatenate"})

# the evaluator of a leaf: (node, first row, last row + 1) -> tensor, or None if it is no leaf
ReadRows = Callable[[Any, int, int], Any]


class RowEvaluator:
    """Evaluates rows of one output tensor; make a new one for the next, as it may keep what it computed.

    read_rows: reads rows of a tensor in a file. independent: further function names that treat rows alike.
    checked: sees rows of leaves that lie in memory already, and returns them.
    ``n_whole`` counts the nodes that had to be evaluated whole.
    """

    def __init__(
        self,
        read_rows: ReadRows,
        independent: frozenset[str] = frozenset(),
        checked: Callable[[Any, Any], Any] = lambda rows, node: rows,
    ) -> None:
        self.read_rows = read_rows
        self.checked = checked
        self.elementwise = _ELEMENTWISE | independent
        self.n_whole = 0
        self._whole: dict[int, Any] = {}

    def rows(self, node: Any, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of a lazy tensor with at least one axis, as a plain tensor or array."""
        if not _is_lazy(node):
            return node[start:stop]
        if node._data is not None:
            return self.checked(node._data[start:stop], node)
        found = self.read_rows(node, start, stop)
        if found is None:
            found = self._pushed_down(node, start, stop)
        wanted = (stop - start, *node._meta.shape[1:])
        if found is not None and tuple(found.shape) == wanted and found.dtype == node._meta.dtype:
            return found
        if id(node) not in self._whole:
            self.n_whole += 1
            self._whole[id(node)] = self.whole(node)
        return self._whole[id(node)][start:stop]

    def whole(self, node: Any) -> Any:
        """All of a lazy tensor; nothing on the way is kept."""
        if not _is_lazy(node):
            return node
        if node._data is not None:
            return self.checked(node._data, node)
        if id(node) in self._whole:
            return self._whole[id(node)]
        shape = tuple(node._meta.shape)
        if shape and (leaf := self.read_rows(node, 0, shape[0])) is not None:
            return leaf
        inner, arguments, pick = _call_of(node)
        result = inner(*self._evaluated(arguments), **node._kwargs)
        return result if pick is None else result[pick]

    def _evaluated(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._evaluated(item) for item in value)
        return self.whole(value)

    def _pushed_down(self, node: Any, start: int, stop: int) -> Any:
        """The rows computed from rows of the arguments; None where this operation mixes rows."""
        function, arguments, pick = _call_of(node)
        name, n_rows = _name_of(function, node), node._meta.shape[0]
        arguments = list(arguments)
        keywords = dict(node._kwargs)
        if not arguments:
            return None
        if name in _STACKS:
            if _axis(arguments, keywords, 1, 0, len(node._meta.shape)) != 0:
                return None
            return torch.stack([self.whole(part) for part in arguments[0][start:stop]])
        if name in _CATS:
            return self._concatenated(arguments, keywords, start, stop)
        source = arguments[0]
        if (offset := _first_row(name, arguments, source)) is not None:
            return function(
                self.rows(source, start + offset, stop + offset), (slice(None), *arguments[1][1:])
            )
        if name in _BINARY:
            return self._binary(function, arguments, keywords, n_rows, start, stop)
        if not _is_lazy(source) or not source._meta.shape or source._meta.shape[0] != n_rows:
            return None
        if any(_has_lazy(value) for value in [*arguments[1:], *keywords.values()]):
            return None
        if name in _RESHAPES:
            replaced = _reshape_arguments(arguments[1:], keywords, n_rows, stop - start)
            if replaced is None:
                return None
            arguments[1:], keywords = replaced, {}
        elif not (name in self.elementwise or _keeps_rows(name, arguments, keywords, source._meta.dim)):
            return None
        arguments[0] = self.rows(source, start, stop)
        result = _converted(node, function, arguments)
        if result is None:
            result = function(*arguments, **keywords)
        return result if pick is None else result[pick]

    def _binary(
        self,
        function: Any,
        arguments: list[Any],
        keywords: dict[str, Any],
        n_rows: int,
        start: int,
        stop: int,
    ) -> Any:
        n_dims = max((len(value.shape) for value in arguments if hasattr(value, "shape")), default=0)
        operands = []
        for value in arguments:
            shape: tuple[int, ...] = tuple(value.shape) if hasattr(value, "shape") else ()
            if shape and len(shape) == n_dims and shape[0] == n_rows:
                operands.append(self.rows(value, start, stop))
            elif not shape or len(shape) < n_dims or shape[0] == 1:  # broadcast over the leading axis
                operands.append(self.whole(value))
            else:
                return None
        return function(*operands, **keywords)

    def _concatenated(self, arguments: list[Any], keywords: dict[str, Any], start: int, stop: int) -> Any:
        parts = arguments[0]
        axis = _axis(arguments, keywords, 1, 0, len(parts[0].shape))
        if axis != 0:
            return torch.cat([self.rows(part, start, stop) for part in parts], dim=axis)
        found, first = [], 0
        for part in parts:
            last = first + part.shape[0]
            if first < stop and start < last:
                found.append(self.rows(part, max(start, first) - first, min(stop, last) - first))
            first = last
        return torch.cat(found, dim=0)


def _converted(node: Any, function: Any, arguments: list[Any]) -> Any:
    """float32 to float16 or BF16 with torch: NumPy's rounding (to nearest even), several times faster.

    None if the operation is another. Values that are not finite are refused elsewhere.
    """
    rows = arguments[0]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32:
        return None
    kind = getattr(getattr(function, "__self__", None), "__name__", "")
    if kind == "BF16" and function.__name__.endswith("__quantize_array"):
        return torch.from_numpy(rows).to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if arguments[1:] == [np.float16] and node._meta.dtype == np.float16:
        return torch.from_numpy(rows).to(torch.float16).numpy()
    return None


def _is_lazy(value: Any) -> bool:
    return hasattr(value, "_meta") and hasattr(value, "_func")


def _has_lazy(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_lazy(item) for item in value)
    return _is_lazy(value)


def _call_of(node: Any) -> tuple[Any, Any, int | None]:
    """(function, arguments, which element of its result) of a node."""
    closure = _closure(node._func)
    if node._func.__name__ == "eager_tuple_element" and "fn" in closure:
        shared, index = node._args
        return closure["fn"], shared[0], index
    return node._func, node._args, None


def _name_of(function: Any, node: Any) -> str:
    """What an operation is called; the converter wraps methods in functions that know the method's name."""
    closure = _closure(function)
    if isinstance(closure.get("name"), str):
        return closure["name"]
    name = getattr(function, "__name__", "")
    if name == "<lambda>":
        names = function.__code__.co_names
        return names[0] if names in (("numpy",), ("astype",)) else ""
    if name.endswith("__quantize_array") and len(node._meta.shape) > 1:
        return "astype"  # blocks never cross a row
    return name


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _axis(arguments: list[Any], keywords: dict[str, Any], place: int, default: int, n_dims: int) -> int:
    value = arguments[place] if len(arguments) > place else keywords.get("dim", keywords.get("axis", default))
    return value % n_dims


def _keeps_rows(name: str, arguments: list[Any], keywords: dict[str, Any], n_dims: Callable[[], int]) -> bool:
    """Whether an operation on the other axes leaves the leading one alone."""
    if name in ("mT", "mH"):
        return n_dims() > 2
    if name in _SWAPS and len(arguments) == 3:
        return all(axis % n_dims() != 0 for axis in arguments[1:])
    if name == "unsqueeze" and len(arguments) == 2:
        return arguments[1] % (n_dims() + 1) != 0
    if name == "permute":
        order = arguments[1] if isinstance(arguments[1], (list, tuple)) else arguments[1:]
        return len(order) > 0 and order[0] % n_dims() == 0
    if name in _SPLITS:
        return _axis(arguments, keywords, 2, 0, n_dims()) != 0
    if name == "__getitem__":
        index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
        simple = all(item is Ellipsis or isinstance(item, (int, slice)) for item in index)
        if not simple or not index:
            return False
        if index[0] is Ellipsis:
            return len(index) - 1 < n_dims()
        return index[0] == slice(None)
    return False


def _first_row(name: str, arguments: list[Any], source: Any) -> int | None:
    """Where ``tensor[a:b, ...]`` begins; None for any other operation or index."""
    if name != "__getitem__" or not _is_lazy(source) or len(arguments) != 2:
        return None
    index = arguments[1]
    if not isinstance(index, tuple):
        arguments[1] = index = (index,)
    if (
        not index
        or not isinstance(index[0], slice)
        or index[0].step not in (None, 1)
        or index[0] == slice(None)
    ):
        return None
    if not all(isinstance(item, (int, slice)) for item in index[1:]):
        return None
    return index[0].indices(source._meta.shape[0])[0]


def _reshape_arguments(
    sizes: list[Any], keywords: dict[str, Any], n_rows: int, n_wanted: int
) -> list[Any] | None:
    """The arguments of view or reshape for fewer rows; None if it is not the leading axis that they keep."""
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        return sizes
    if keywords or not sizes:
        return None
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = list(sizes[0])
    if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes) or sizes[0] != n_rows:
        return None
    return [n_wanted, *sizes[1:]]
