"""Elements of the CPU kernels: bit patterns in, float32 to compute with, bit patterns out.

numpy knows no bfloat16 and numba computes with neither half type: uint16 stands for bfloat16,
int16 for float16. Logits are in base 2, so that a softmax takes powers of two.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# Everything but the licence to ignore NaN and infinity.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
# For what runs in a loop over tiles. Without it each view of an array counts a reference to it,
# atomically, which took 40 % of the time of small batches; such a function allocates nothing.
INNER: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "_nrt": False}


@intrinsic
def half_to_float(typingctx, bits):
    """float16 from its int16 bit pattern, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


@intrinsic
def float_to_half(typingctx, value):
    """float32 rounded to float16, as an int16 bit pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


def widen(x):
    """`x` as float32."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen_for(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return lambda x: half_to_float(x)
    return lambda x: x


def pair(low, high):
    """Two elements in 32 bits; 0 where they have more than 16 each."""
    raise NotImplementedError


@overload(pair, inline="always")
def _pair_for(low, high):
    if low == types.uint16:
        return lambda low, high: np.uint32(low) | (np.uint32(high) << np.uint32(16))
    return lambda low, high: np.uint32(0)


def store(row, x):
    """Round float32 `x` to the type of `row`, to nearest even."""
    raise NotImplementedError


@overload(store, inline="always")
def _store_for(row, x):
    if row.dtype == types.uint16:

        def rounded(row, x):
            for d in range(row.shape[0]):
                bits = np.float32(x[d]).view(np.uint32)
                even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
                row[d] = np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16)

    elif row.dtype == types.int16:

        def rounded(row, x):
            for d in range(row.shape[0]):
                row[d] = float_to_half(x[d])

    else:

        def rounded(row, x):
            for d in range(row.shape[0]):
                row[d] = x[d]

    return rounded


@njit(inline="always")
def all_finite(x):
    """Whether all elements are."""
    check = np.float32(0)
    for d in range(x.shape[0]):
        check += x[d] * np.float32(0)
    return check == 0


@njit(inline="always")
def power(x):
    """`2^x` for x <= 0 to 2 ulp, 0 below 2^-126; it vectorises, and `np.exp2` does not."""
    y = np.float32(-127) if x < np.float32(-127) else x  # keeps NaN; 2^-127 comes out as 0
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    p = np.float32(1.3276471e-3)
    p = p * f + np.float32(9.6755414e-3)
    p = p * f + np.float32(5.5507133e-2)
    p = p * f + np.float32(2.4022120e-1)
    p = p * f + np.float32(6.9314697e-1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
