"""Triton kernels run by Triton's interpreter, on tensors of the CPU.

`TRITON_INTERPRET` has to be set before Triton is imported, for the whole process and all that it
starts. Instead, the compiled functions of some modules give way to interpreted ones for as long as
they are needed, and so does Triton's own library, which they call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

# Loaded on the first launch otherwise, and then refused for what is interpreted by then.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from triton.language import standard
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _convert_float,
)
from triton.runtime.jit import JITFunction


class Interpreted(InterpretedFunction):
    """A function whose calls by a kernel leave the library patched as the kernel's launch did.

    Each would patch it again, which takes longer than most of them do. Infinities and NaN are
    numbers like others, as on a GPU.
    """

    def run(self, *args: object, **options: object) -> None:
        with np.errstate(all="ignore"):
            super().run(*args, **options)

    def __call__(self, *args: object, **options: object) -> object:
        return self.rewrite()(*args, **options)


_product = InterpreterBuilder.create_dot


def _dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> object:
    """Triton 3.9 keeps bfloat16 as bits, and multiplies the bits."""
    return _product(builder, _as_float(a), _as_float(b), *rest)


def _as_float(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = _convert_float(x.data, tl.bfloat16, tl.float32, None)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _splat(builder: InterpreterBuilder, block: object, scalar: TensorHandle) -> TensorHandle:
    """Triton 3.9 makes a number of a comparison's result where it meets a block."""
    return TensorHandle(np.full(block.shape, scalar.data, scalar.data.dtype), scalar.dtype.scalar)


@contextlib.contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Interpret the kernels of `modules`."""
    made: dict[object, Interpreted] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(InterpreterBuilder, "create_splat", _splat)
        for module in (tl, standard, *modules):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    own = made.setdefault(value.fn, Interpreted(value.fn))
                    patch.setattr(module, name, own)
        yield
