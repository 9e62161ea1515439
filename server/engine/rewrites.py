"""How the rows of one method are rewritten in the layers of a step, and what was done to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from server.kernels.partials import Changes, Partials, PoolMap, RowMap


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
    if not calibrator.pools:
        return Scaling(calibrator, stack, rows)
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


def _asked(
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


def _account(changes: Sequence[Change], finite: Tensor) -> Done:
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


def _in_order(rows: RowMap, stack: Stack) -> bool:
    """A row per slot, as where all generate: tables are taken as they are."""
    return np.array_equal(rows.arrays[2], np.arange(len(stack.programs)))


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
        self._direct = _in_order(self.rows, self.stack)
        self._finite = torch.ones(len(self._slot), dtype=torch.bool, device=self.stack.device)

    def computed(self, layer: int) -> frozenset[int]:  # noqa: ARG002 - the same in all layers
        """None: the stock output is what is corrected."""
        return frozenset()

    def apply(self, layer: int, attention: kernels.Attention, output: Tensor) -> None:
        """Rewrite one layer; a calibrator that raises fails its requests alone."""
        partials = attention.pool_partials(self.stack.table(layer))
        mass = partials.mass if self.gather is None else self.gather(partials.mass)
        ask = partial(self._change, layer, mass, partials.pools)
        change = attempt(self.calibrator.name, ask)
        if change is None:
            self._finite[:] = False
            return
        self._finite &= kernels.combine(output, self.rows, change.touched, partials, change.factors)
        self._changes.append(change)

    def _change(self, layer: int, mass: Tensor, pools: int) -> Change:
        tables = self.stack.parameters
        parameters = {name: self._by_row(table[layer]) for name, table in tables.items()}
        heads = self._by_row(self.stack.heads[layer])
        return _asked(self.calibrator, _masses(mass, pools), parameters, heads, self._own)

    def _by_row(self, per_slot: Tensor) -> Tensor:
        return per_slot if self._direct else per_slot[self._slot]

    def _own(self, per_head: Tensor) -> Tensor:
        """The part of this rank."""
        return per_head if self.gather is None else per_head[:, self.stack.programs[0].own]

    def done(self) -> Done:
        """Add up the layers."""
        return _account(self._changes, self._finite)


@dataclass
class Scaling:
    """Of a method without pools, whose whole row is the rest: that tells rows of a request apart by
    nothing, so that the calibrator is asked once per request and layer, and not in every step.
    """

    calibrator: Calibrator
    stack: Stack
    rows: RowMap
    _finite: Tensor = field(init=False)
    _changes: list[Change] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._slot = self.rows.slot.long().to(self.stack.device)
        self._direct = _in_order(self.rows, self.stack)
        self._finite = torch.ones(len(self._slot), dtype=torch.bool, device=self.stack.device)

    def computed(self, layer: int) -> frozenset[int]:  # noqa: ARG002 - the same in all layers
        """None: the stock output is what is scaled."""
        return frozenset()

    def apply(
        self,
        layer: int,
        attention: kernels.Attention,  # noqa: ARG002 - no key is read
        output: Tensor,
    ) -> None:
        """Rewrite one layer; a calibrator that raises fails its requests alone."""
        change = self.stack.scales.get(layer)
        if change is None:
            change = attempt(self.calibrator.name, partial(self._change, layer))
        if change is None:
            self._finite[:] = False
            return
        self.stack.scales[layer] = change
        touched, factors = change.touched, change.factors
        if not self._direct:
            touched, factors = touched[self._slot], factors[self._slot]
        whole = Partials.whole(output, len(self._slot))
        self._finite &= kernels.combine(output, self.rows, touched, whole, factors)
        self._changes.append(change)

    def _change(self, layer: int) -> Change:
        heads = self.stack.heads[layer]
        parameters = {name: table[layer] for name, table in self.stack.parameters.items()}
        masses = _masses(torch.ones(*heads.shape, 1, device=heads.device), 0)
        return _asked(self.calibrator, masses, parameters, heads)

    def done(self) -> Done:
        """Add up the layers."""
        slot = self.rows.arrays[2]
        own = _account(self._changes, torch.ones(len(self.stack.programs), dtype=torch.bool))
        sums = {name: values[slot] for name, values in own.sums.items()}
        return Done(self._finite.cpu().numpy(), own.rewritten[slot], own.count[slot], sums)
