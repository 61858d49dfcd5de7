"""Makes Triton's interpreter trustworthy, and runs a pass in it with guarded memory.

The interpreter (triton 3.6 and 3.8) does bfloat16 arithmetic on the raw bits, truncates where it should round to
bfloat16, and lets accesses out of bounds pass; that of 3.6 can't loop with a recent numpy. Only for processes with
``TRITON_INTERPRET=1``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from effnet_fast.passes import reference
from effnet_fast.passes.triton import depthwise, depthwise_backward, pointwise, reductions
from tests.passes.samples import Call

MODULES = (depthwise, depthwise_backward, pointwise, reductions)
LAUNCHERS = {
    launcher.__name__: launcher
    for launcher in (
        pointwise.channel_stats,
        depthwise.dwconv_stats,
        pointwise.pool,
        pointwise.apply,
        pointwise.backward_sums,
        depthwise_backward.backward_dwconv,
        pointwise.backward_apply,
        depthwise.dwconv_affine,
    )
}

# Relative to the largest value of an output. float32: some hundred roundings of 6e-8. 16 bit: the storage's rounding of
# an activation, 2^-9 and 2^-12 of it; sums of such values average out.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# float16 takes the same way through the kernels as bfloat16, and a third of the time.
DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))

HALO = 4096  # values on either side: more than a row of any sample
SENTINEL = -12345.0


def _convert_float(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(value: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if source != tl.float32 or target != tl.bfloat16:
            return original(value, source, target, rounding_mode)
        bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)

    return convert


def _binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            raise TypeError("bfloat16 arithmetic: the interpreter works on the raw bits, convert to float32 first")
        return original(self, left, right, op)

    return binary_op


def _patch_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    """The bounds of a loop are arrays of one value, of which int() makes no number from numpy 2.4 on."""

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_tensor


def _patch_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter replaces triton.language's functions anew in every call of a function: a third of its time."""
    active: dict[tuple[str, ...], Any] = {}  # by what a function sees of triton.language

    def patch_lang(fn: Any) -> Any:
        sees = tuple(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if sees in active:
            return interpreter._LangPatchScope()
        scope = original(fn)
        if not active:  # the launch itself, which undoes everything when it ends
            undo = scope.restore

            def restore() -> None:
                inner = list(active.values())[1:]
                active.clear()
                for nested in reversed(inner):
                    nested.restore()
                undo()

            scope.restore = restore
        active[sees] = scope
        return scope

    return patch_lang


def fix_interpreter() -> None:
    """Round to nearest even, refuse arithmetic that would be wrong, loop, and save time."""
    interpreter._patch_lang_tensor = _patch_tensor(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._convert_float = _convert_float(interpreter._convert_float)
    interpreter.InterpreterBuilder.binary_op = _binary_op(interpreter.InterpreterBuilder.binary_op)


class Guard:
    """Memory with a halo: NaN around what is read, a sentinel around what is written (and NaN in it until then)."""

    def __init__(self) -> None:
        self.halos: list[Tensor] = []

    def input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        memory = torch.full((value.numel() + 2 * HALO,), float("nan"), dtype=value.dtype)
        inner = memory.as_strided(value.shape, value.stride(), HALO)
        return inner.copy_(value)

    def output(self, value: Tensor) -> Tensor:
        memory = torch.full((value.numel() + 2 * HALO,), SENTINEL, dtype=value.dtype)
        memory[HALO : HALO + value.numel()] = float("nan")
        self.halos += [memory[:HALO], memory[HALO + value.numel() :]]
        return memory.as_strided(value.shape, value.stride(), HALO)

    def check(self) -> None:
        for halo in self.halos:
            assert (halo == halo.new_tensor(SENTINEL)).all(), "a kernel wrote out of bounds"

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Guards all that the launchers allocate for kernels to write to, and the packed weights that they read."""
        wraps = {
            "convolution_output": self.output,
            "empty_like_nhwc": self.output,
            "empty_floats": self.output,
            "pack_weight": self.input,
        }
        with ExitStack() as stack:
            for module in MODULES:
                for name in wraps.keys() & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, name, _then(getattr(module, name), wraps[name])))
            yield


def _then(function: Callable[..., Tensor], wrap: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *args: wrap(function(*args))


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def check(call: Call, dtype: torch.dtype) -> None:
    """Runs a pass in guarded memory, and compares its results with the reference in float64."""
    guard = Guard()
    with guard.allocations():
        actual = tensors(LAUNCHERS[call.name](*map(guard.input, call.args)))
    guard.check()
    expected = tensors(getattr(reference, call.name)(*call.to_float64()))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        is_activation = a.dim() == 4 and not (call.name == "backward_dwconv" and i == 1)
        assert a.shape == e.shape
        assert a.dtype == (dtype if is_activation else torch.float32)
        assert a.is_contiguous(memory_format=torch.channels_last) or not is_activation
        limit = TOLERANCE[dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(a.double(), e, rtol=0, atol=limit, msg=lambda m, i=i: f"{call.name}[{i}]: {m}")
