"""Repairs of Triton's interpreter, which runs the GPU kernels in tests without a GPU."""

from typing import Any

import numpy
import triton.language as tl
import triton.runtime.interpreter as interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch(tensor: Any, scope: Any) -> None:
    """The interpreter's scalars are arrays of one; newer numpy makes no loop bound of those."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


def _as_float32(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    bits = handle.data.astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as uint16 and would multiply the bits."""
    return _create_dot(self, _as_float32(a), _as_float32(b), *rest)


interpreter.InterpreterBuilder.create_dot = _dot
