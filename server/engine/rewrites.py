"""How the rows of one method are rewritten in the layers of a step, and what was done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrators.capabilities import across_heads
from calibrators.interface import Calibrator, Coefficients, Masses
from server.engine.guard import attempt
from server.engine.ranks import Gather
from server.engine.stack import Stack
from server.kernels import dispatch as kernels
from server.kernels.partials import Changes, PoolMap, RowMap


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


class Rewrite(Protocol):
    """Rewrites rows layer by layer."""

    def computed(self, layer: int) -> frozenset[int]:
        """Slots for whose rows `apply` needs no stock output."""
        ...

    def apply(self, layer: int, attention: kernels.Attention, output: Tensor) -> None:
        """Rewrite the rows of `output` `[tokens, heads, head_dim]` in place."""
        ...

    def done(self) -> Done:
        """The account, once the last layer has run."""
        ...


def rewrite(
    calibrator: Calibrator,
    stack: Stack,
    rows: RowMap,
    complete: frozenset[int],
    gather: Gather | None = None,
) -> Rewrite:
    """The quickest way a method allows; `complete` slots have all their rows in `rows`."""
    if across_heads(calibrator):
        return Recombining(calibrator, stack, rows, gather)
    if stack.maps is not None and _rescales(type(calibrator)):
        return Rescaling(calibrator, stack, stack.maps, rows, complete)
    return Recombining(calibrator, stack, rows)


def _rescales(method: type[Calibrator]) -> bool:
    """A closed form is that of the `coefficients` beside it, and not of a subclass's own."""
    for base in method.__mro__:
        if "rescales" in vars(base) or "coefficients" in vars(base):
            return vars(base).get("rescales") is not None and "coefficients" in vars(base)
    return False


class Rescaling:
    """Of a method that multiplies its pool by a parameter: one kernel, and no call per layer.

    The same kernel computes the attention of requests that the layer changes anything for, which
    is cheaper than to correct the stock output: that takes a second pass over their keys. Where a
    parameter changes nothing the stock output stays, bit for bit.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        stack: Stack,
        maps: Sequence[PoolMap],
        rows: RowMap,
        complete: frozenset[int],
    ) -> None:
        self._pool = calibrator.pools[0]
        factors = stack.parameters[str(calibrator.rescales)]
        self._factors, self._pools = factors, maps
        # Not on an accelerator: to leave rows out of the stock kernel's batch makes the host wait.
        changed = stack.changed_by(factors) if stack.device.type == "cpu" else None
        self._changed, self._complete = changed, complete
        self._slots = len(stack.programs)
        self._computed: dict[frozenset[int], Tensor] = {}
        self._device = stack.device
        self._changes = Changes.none(len(rows.token), stack.heads[0].shape[1], stack.device)

    def computed(self, layer: int) -> frozenset[int]:
        """Slots that the layer changes anything for."""
        return frozenset() if self._changed is None else self._changed[layer] & self._complete

    def apply(self, layer: int, attention: kernels.Attention, output: Tensor) -> None:
        """Rewrite one layer."""
        slots = self.computed(layer)
        if slots not in self._computed:
            table = torch.zeros(self._slots, dtype=torch.bool)
            table[list(slots)] = True
            self._computed[slots] = table.to(self._device)
        attention.rescale(
            output, self._pools[layer], self._factors[layer], self._computed[slots], self._changes
        )

    def done(self) -> Done:
        """The kernel's own account."""
        count, before, after, finite = self._changes.arrays
        sums = {
            f"{self._pool}_mass_before": before.sum(1),
            f"{self._pool}_mass_after": after.sum(1),
        }
        total = count.sum(1)
        return Done(finite, total > 0, total, sums)


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


def _masses(mass: Tensor, pools: int) -> Masses:
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


@dataclass
class Recombining:
    """Of any method: measure the pools, ask for coefficients, combine.

    With `gather`, the calibrator is asked with the heads of all ranks. Nothing that may fail on one
    rank alone comes before the gathering in a layer, or decides whether there is one.
    """

    calibrator: Calibrator
    stack: Stack
    rows: RowMap
    gather: Gather | None = None
    _finite: Tensor = field(init=False)
    _changes: list[Change] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._slot = self.rows.slot.long().to(self.stack.device)
        self._finite = torch.ones(len(self._slot), dtype=torch.bool, device=self.stack.device)

    def computed(self, layer: int) -> frozenset[int]:  # noqa: ARG002 - the same in all layers
        """None: the stock output is what is corrected."""
        return frozenset()

    def apply(self, layer: int, attention: kernels.Attention, output: Tensor) -> None:
        """Rewrite one layer; a calibrator that raises fails its requests alone."""
        partials = attention.pool_partials(self.stack.pools[layer])
        mass = partials.mass if self.gather is None else self.gather(partials.mass)
        ask = partial(self._change, layer, mass, partials.pools)
        change = attempt(self.calibrator.name, ask)
        if change is None:
            self._finite[:] = False
            return
        self._finite &= kernels.combine(output, self.rows, change.touched, partials, change.factors)
        self._changes.append(change)

    def _change(self, layer: int, mass: Tensor, pools: int) -> Change:
        """Ask the calibrator, and have its answer in the shapes and types of the kernels.

        Those check nothing: whatever does not fit has to raise here.
        """
        tables = self.stack.parameters
        parameters = {name: table[layer][self._slot] for name, table in tables.items()}
        masses, shape = _masses(mass, pools), mass.shape[:2]
        result = self.calibrator.coefficients(masses, parameters)
        heads = self.stack.heads[layer][self._slot]
        touched = counted = heads
        if result.apply is not None:
            touched = counted = heads & self._own(result.apply.expand(shape))
        if result.eligible is not None:
            counted = heads & self._own(result.eligible.expand(shape))
        factors = _factors(result, masses)
        if result.scale is not None:
            factors = factors * result.scale.float()[..., None]
        statistics = result.statistics.items()
        return Change(
            touched.contiguous(),
            counted,
            self._own(factors).contiguous(),
            {name: self._own(values.float().expand(shape)) for name, values in statistics},
        )

    def _own(self, per_head: Tensor) -> Tensor:
        """The part of this rank."""
        return per_head if self.gather is None else per_head[:, self.stack.programs[0].own]

    def done(self) -> Done:
        """Add up the layers."""
        rows = len(self._slot)
        if not self._changes:
            return Done(self._finite.cpu().numpy(), np.zeros(rows, np.bool_), np.zeros(rows), {})
        counted = torch.stack([change.counted for change in self._changes])
        touched = torch.stack([change.touched for change in self._changes])
        sums = {name: self._sum(name, counted) for name in self._changes[0].statistics}
        rewritten, count = touched.any(2).any(0).cpu().numpy(), counted.sum((0, 2)).cpu().numpy()
        return Done(self._finite.cpu().numpy(), rewritten, count, sums)

    def _sum(self, statistic: str, counted: Tensor) -> npt.NDArray[Any]:
        values = torch.stack([change.statistics[statistic] for change in self._changes])
        total: npt.NDArray[Any] = torch.where(counted, values, 0).sum((0, 2)).cpu().numpy()
        return total
