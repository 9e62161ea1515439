"""A calibrator's coefficients as kernels take them, and the account of them over a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrators.interface import Calibrator, Coefficients, Masses


@dataclass(frozen=True, slots=True)
class Done:
    """What was done to each row over all layers of a step.

    Attributes:
        finite: bool `[rows]`; False where something went wrong and the request must fail.
        rewritten: bool `[rows]`, in at least one head and layer.
        count: int `[rows]`, heads and layers that statistics are over.
        sums: float `[rows]` by statistic, over what `count` counts.
    """

    finite: npt.NDArray[np.bool_]
    rewritten: npt.NDArray[np.bool_]
    count: npt.NDArray[Any]
    sums: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """What a calibrator does to its rows in one layer.

    Attributes:
        touched: bool `[rows, heads]`, outputs that are rewritten.
        counted: bool `[rows, heads]`, what statistics are over.
        factors: float32 `[rows, heads, columns]`, head scale included; columns as of `Partials`.
        statistics: float32 `[rows, heads]` each.
    """

    touched: Tensor
    counted: Tensor
    factors: Tensor
    statistics: Mapping[str, Tensor]


def as_masses(mass: Tensor, pools: int) -> Masses:
    """Columns as a calibrator gets them."""
    weighted = mass[..., pools:-1] if mass.shape[2] > pools + 1 else None
    return Masses(mass[..., :pools], mass[..., -1], weighted)


def _factors(result: Coefficients, masses: Masses) -> Tensor:
    """`c_g`, where any pool has weights `d_g`, and `c_rest`, side by side."""
    if result.pools is None and masses.plain.shape[2]:
        raise ValueError("no coefficients of the pools")
    plain = masses.plain if result.pools is None else result.pools
    if masses.weighted is None:
        if result.weighted is not None:
            raise ValueError("coefficients of weights where no pool has any")
        columns = [plain]
    else:
        columns = [plain, plain.new_zeros(()) if result.weighted is None else result.weighted]
    each = [column.float().expand_as(masses.plain) for column in columns]
    return torch.cat([*each, result.rest.float().expand_as(masses.rest)[..., None]], -1)


def asked(
    calibrator: Calibrator,
    masses: Masses,
    parameters: Mapping[str, Tensor],
    heads: Tensor,
    own: Callable[[Tensor], Tensor] = lambda per_head: per_head,
) -> Change:
    """What the calibrator answers, in the shapes and types of the kernels.

    Those check nothing: whatever does not fit has to raise here.
    """
    shape = masses.rest.shape
    result = calibrator.coefficients(masses, parameters)
    touched = counted = heads
    if result.apply is not None:
        touched = counted = heads & own(result.apply.expand(shape))
    if result.eligible is not None:
        counted = heads & own(result.eligible.expand(shape))
    factors = _factors(result, masses)
    if result.scale is not None:
        factors = factors * result.scale.float()[..., None]
    statistics = result.statistics.items()
    return Change(
        touched.contiguous(),
        counted,
        own(factors).contiguous(),
        {name: own(values.float().expand(shape)) for name, values in statistics},
    )


def account(changes: Sequence[Change], finite: Tensor) -> Done:
    """All layers of a step together."""
    if not changes:
        rows = len(finite)
        return Done(finite.cpu().numpy(), np.zeros(rows, np.bool_), np.zeros(rows), {})
    counted = torch.stack([change.counted for change in changes])
    touched = torch.stack([change.touched for change in changes])
    sums = {}
    for name in changes[0].statistics:
        values = torch.stack([change.statistics[name] for change in changes])
        sums[name] = torch.where(counted, values, 0).sum((0, 2)).cpu().numpy()
    rewritten, count = touched.any(2).any(0).cpu().numpy(), counted.sum((0, 2)).cpu().numpy()
    return Done(finite.cpu().numpy(), rewritten, count, sums)
