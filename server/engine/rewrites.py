"""How the rows of one method are rewritten in the layers of a step, and what was done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from calibrators.capabilities import across_heads
from calibrators.interface import Calibrator
from server.engine.answers import Answers, compile_for, in_order
from server.engine.coefficients import Change, Done, account, as_masses, asked
from server.engine.guard import attempt
from server.engine.ranks import Gather
from server.engine.stack import Stack
from server.kernels import dispatch as kernels
from server.kernels.partials import NO_ROWS, Changes, Partials, PoolMap, RowMap

Reading: TypeAlias = Callable[[], kernels.Attention]
"""Gets the layer's attention ready to be read, which costs something."""


class Rewrite(Protocol):
    """Rewrites rows layer by layer."""

    def computed(self, layer: int) -> frozenset[int]:
        """Slots for whose rows `apply` needs no stock output."""
        ...

    def apply(self, layer: int, attention: Reading, output: Tensor) -> None:
        """Rewrite the rows of `output` `[tokens, heads, head_dim]` in place."""
        ...

    def done(self) -> Done:
        """The account, once the last layer has run."""
        ...

    def restart(self) -> None:
        """Forget what was done: another step comes, of the same rows one token later."""
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


def prepare(calibrators: Iterable[Calibrator], heads: int) -> None:
    """Compile for so many heads what methods will be asked for on the CPU."""
    for calibrator in calibrators:
        if calibrator.pools and not _rescales(type(calibrator)):
            compile_for(calibrator, heads)


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

    def apply(self, layer: int, attention: Reading, output: Tensor) -> None:
        """Rewrite one layer."""
        slots = self.computed(layer)
        if slots not in self._computed:
            table = torch.zeros(self._slots, dtype=torch.bool)
            table[list(slots)] = True
            self._computed[slots] = table.to(self._device)
        attention().rescale(
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

    def restart(self) -> None:
        """Count from nothing."""
        self._changes.clear()


class Recombining:
    """Of any method: measure the pools, ask for coefficients, combine.

    With `gather`, the calibrator is asked with the heads of all ranks. Nothing that may fail on one
    rank alone comes before the gathering in a layer, or decides whether there is one.
    """

    def __init__(
        self, calibrator: Calibrator, stack: Stack, rows: RowMap, gather: Gather | None = None
    ) -> None:
        self._calibrator, self._stack, self._rows, self._gather = calibrator, stack, rows, gather
        self._answers = Answers(calibrator, stack, rows, gather)
        self._finite = torch.ones(len(rows.token), dtype=torch.bool, device=stack.device)
        self._moved = False
        # By layer, bool `[rows]` and their slots.
        self._computed: dict[int, tuple[Tensor, frozenset[int]]] = {}

    def computed(self, layer: int) -> frozenset[int]:
        """Slots that generate, and of which this step's like has measured and changed all heads.

        What reads all keys makes outputs as quickly as it corrects them. But what changes nothing
        has to leave every bit alone, and that is not known before a calibrator is asked.
        """
        return self._computed[layer][1] if layer in self._computed else frozenset()

    def apply(self, layer: int, attention: Reading, output: Tensor) -> None:
        """Rewrite one layer; a calibrator that raises fails its requests alone."""
        partials = attention().pool_partials(self._stack.table(layer))
        mass = partials.mass if self._gather is None else self._gather(partials.mass)
        answer = attempt(self._calibrator.name, partial(self._answers.ask, layer, mass))
        if answer is None:
            self._finite[:] = False
            answer = torch.zeros(mass.shape[:2], dtype=torch.bool, device=mass.device), mass
        computed = self._computed[layer][0] if layer in self._computed else NO_ROWS
        self._finite &= kernels.combine(
            output, self._rows, answer[0], partials, answer[1], computed
        )
        # Without pools nothing is measured but the stock output.
        if self._moved and partials.pools and layer not in self._computed:
            self._computed[layer] = self._computable(layer, partials.pools, *answer)

    def _computable(
        self, layer: int, pools: int, touched: Tensor, factors: Tensor
    ) -> tuple[Tensor, frozenset[int]]:
        """Rows that are changed, and of which every head is selected; and their slots."""
        neutral = torch.ones(factors.shape[2])
        neutral[pools:-1] = 0
        changed = (touched & (factors != neutral).any(2)).any(1)
        slot = self._rows.slot.long()
        rows = changed & self._stack.heads[layer][slot].all(1)
        return rows, frozenset(slot[rows].tolist())

    def done(self) -> Done:
        """Add up the layers."""
        return self._answers.account(self._finite)

    def restart(self) -> None:
        """Count from nothing."""
        self._moved = True
        self._finite[:] = True
        self._answers.clear()


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
    _known: Done | None = field(init=False, default=None)
    _whole: Partials | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._slot = self.rows.slot.long().to(self.stack.device)
        self._direct = in_order(self.rows, self.stack)
        self._finite = torch.ones(len(self._slot), dtype=torch.bool, device=self.stack.device)

    def computed(self, layer: int) -> frozenset[int]:  # noqa: ARG002 - the same in all layers
        """None: the stock output is what is scaled."""
        return frozenset()

    def apply(
        self,
        layer: int,
        attention: Reading,  # noqa: ARG002 - no key is read
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
        if self._whole is None:
            self._whole = Partials.whole(output, len(self._slot))
        self._finite &= kernels.combine(output, self.rows, touched, self._whole, factors)
        self._changes.append(change)

    def _change(self, layer: int) -> Change:
        heads = self.stack.heads[layer]
        parameters = {name: table[layer] for name, table in self.stack.parameters.items()}
        masses = as_masses(torch.ones(*heads.shape, 1, device=heads.device), 0)
        return asked(self.calibrator, masses, parameters, heads)

    def done(self) -> Done:
        """Add up the layers, once for all steps in which the same was done."""
        if self._known is None:
            slot = self.rows.arrays[2]
            own = account(self._changes, torch.ones(len(self.stack.programs), dtype=torch.bool))
            sums = {name: values[slot] for name, values in own.sums.items()}
            self._known = Done(own.finite, own.rewritten[slot], own.count[slot], sums)
        return replace(self._known, finite=self._finite.cpu().numpy())

    def restart(self) -> None:
        """Count from nothing; what is done to a row is the same in every step."""
        self._finite[:] = True
        self._changes = []
