"""Formulas over rows, traced once and compiled into one loop.

A formula is a function of torch tensors, as a calibrator's coefficients are: a few dozen operations
on a few hundred numbers, in every layer of every step, and torch takes microseconds for each of
them. Here `make_fx` writes down which operations they are, `FormulaSource` turns them into a loop
over rows, and numba compiles that.

A formula may look across the heads of a row. Where it decides by values, looks across rows, or uses
operations that `FormulaSource` does not know, there is no compiled form, and torch computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from server.kernels.cpu_formula_loops import Unknown
from server.kernels.cpu_formula_source import FormulaSource

Formula: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""`formula(mass, *tables)`: of float32 `[rows, heads, columns]` and `[rows, heads]` each."""

Compiled: TypeAlias = Callable[..., None]
"""`compiled(mass, slot, *tables, *results)`: fills its results, numpy arrays all of them.

Tables are `[slots, heads]` here, and `slot`, int32 `[rows]`, says which entry is a row's. Results
are contiguous, `[rows, heads, columns]`, `[rows, heads]` or, over heads, `[rows, 1]`.
"""

# Numbers of rows to trace and to compare with: what depends on them does not go unnoticed.
TRACED, COMPARED = 37, 11
TOLERANCE = 1e-5  # sums over heads may be taken in another order
# Tracing sets a flag of torch's for the whole process, and puts back what it found there.
_tracing = Lock()


def compiled(formula: Formula, heads: int, columns: int, tables: Sequence[torch.dtype]) -> Compiled:
    """The compiled form, which gave what torch gave.

    Args:
        formula: to be compiled.
        heads: query heads of a row.
        columns: of `mass`, the last the remainder of 1.
        tables: types of the tables, bool or float32.

    Raises:
        Unknown: there is none.
        Exception: whatever the formula raises.
    """
    with _tracing:
        graph = make_fx(formula)(*_example(TRACED, heads, columns, tables)).graph
    graph.eliminate_dead_code()
    scope: dict[str, Any] = {"np": np, "F": np.float32, "inf": np.inf, "nan": np.nan}
    exec(compile(FormulaSource(graph).text, f"<compiled {formula}>", "exec"), scope)
    function: Compiled = njit(error_model="numpy")(scope["formula"])
    _compare(formula, function, _example(COMPARED, heads, columns, tables))
    return function


def _example(
    rows: int, heads: int, columns: int, tables: Sequence[torch.dtype]
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    drawn = [torch.rand(rows, heads, generator=generator) for _ in tables]
    mass = torch.randn(rows, heads, columns, generator=generator).softmax(-1)
    chosen = [d > 0.2 if t == torch.bool else d for d, t in zip(drawn, tables, strict=True)]
    return mass, *chosen


def _compare(formula: Formula, function: Compiled, example: Sequence[Tensor]) -> None:
    expected = formula(*example)
    found = [torch.empty(each.shape, dtype=each.dtype) for each in expected]
    slot = np.arange(COMPARED, dtype=np.int32)[::-1].copy()
    mass, *tables = example
    turned = [table.flip(0).numpy() for table in tables]
    function(mass.numpy(), slot, *turned, *(each.numpy() for each in found))
    for ours, torchs in zip(found, expected, strict=True):
        if not torch.allclose(ours.float(), torchs.float(), TOLERANCE, TOLERANCE, equal_nan=True):
            raise Unknown("its compiled form gives something else")
