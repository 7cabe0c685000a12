"""Repairs of Triton's interpreter, which runs the GPU kernels in tests without a GPU.

Two are about results, the others about time: more than half of it went to what changes nothing.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace
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

# -- time -----------------------------------------------------------------------------------------

_patch_lang = interpreter._patch_lang
_type_for_tuple_values = tl.core._type_for_tuple_values
_NOTHING_TO_RESTORE = interpreter._LangPatchScope()


@functools.cache
def _patch_language() -> None:
    _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _patch_once(fn: Any) -> Any:
    """The interpreter patches the whole language for a launch, and again for every function that a
    kernel calls, tl.sum and tl.cdiv among them. Here it stays patched, since nothing is compiled in
    a process that interprets."""
    _patch_language()
    return _NOTHING_TO_RESTORE


interpreter._patch_lang = _patch_once

# Of every sum of integers it computes in 64 bits whether it overflows, to assert it in debug mode
# only, which this is not.
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=_builder.options.debug)

_np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
_get_np_dtype = interpreter._get_np_dtype


def _np_dtype(dtype: Any) -> Any:
    """A block's is that of its elements; the interpreter builds a table for each question."""
    scalar = dtype.scalar
    return _np_dtype_of_scalar(scalar) if type(scalar) is tl.dtype else _get_np_dtype(scalar)


interpreter._get_np_dtype = _np_dtype


@functools.cache
def _type_of_shape(sizes: tuple[int, ...]) -> Any:
    return _type_for_tuple_values([tl.constexpr(size) for size in sizes])


def _type_of_values(values: Any, fields: Any = None) -> Any:
    """Of a tuple. Every intermediate result has a shape, whose type is known by a long name."""
    if fields is None and all(
        type(value) is tl.constexpr and type(value.value) is int for value in values
    ):
        return _type_of_shape(tuple(value.value for value in values))
    return _type_for_tuple_values(values, fields)


tl.core._type_for_tuple_values = _type_of_values
