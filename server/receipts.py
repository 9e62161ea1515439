"""Receipts: what was calibrated for a request, as the workers counted it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from server.admission import Admitted
from server.engine.payload import KEY, Payload, Report, Tally

if TYPE_CHECKING:
    from calibrators.interface import Bound
    from server.middleware.request_log import Record

Number = TypeVar("Number", int, float)
APPLIED, SKIPPED = "applied", "skipped"


class NotApplied(Exception):
    """The engine answered without a word on calibration; the answer must not go out."""


class Receipt:
    """The receipt of one client request, filled while the engine works on it.

    A request may hold several prompts (`/v1/completions`) and several choices per prompt (`n`);
    each prompt gets a ticket, and choices are numbered as in the response.

    Args:
        admitted: what will be applied.
        choices: choices per prompt.
        log: what the request's line of the log will tell.
    """

    def __init__(self, admitted: Admitted, choices: int, log: Record | None = None) -> None:
        self.admitted = admitted
        self.log = log
        self._choices = choices
        self._id = uuid.uuid4().hex
        self._tickets: list[str] = []
        self._tallies: dict[int, Sequence[Tally]] = {}

    @property
    def tickets(self) -> Sequence[str]:
        """Tickets issued so far, one per prompt."""
        return self._tickets

    @property
    def expected_choices(self) -> int:
        """Choices the response will have."""
        return self._choices * len(self._tickets)

    def issue(self) -> dict[str, Any]:
        """Entry of `extra_args` for the next prompt."""
        ticket = f"{self._id}-{len(self._tickets)}"
        self._tickets.append(ticket)
        admitted = self.admitted
        payload = Payload(
            ticket,
            admitted.bounds,
            admitted.prefill.policy,
            admitted.shareable,
            text_layers=admitted.text_layers,
        )
        return {KEY: payload.to_extra_args()}

    def record(self, report: Report, choice: int) -> None:
        """Take a report on choice `choice` of its ticket's prompt; later ones replace it.

        A request that failed is answered with an error and needs no receipt.
        """
        if report.failed:
            return
        prompt = self._tickets.index(report.ticket)
        self._tallies[prompt * self._choices + choice] = report.tallies

    @property
    def outcome(self) -> str:
        """What came of it if it is answered: skipped where no method did anything."""
        tallies = [tally for _, tally in self.totals()]
        return SKIPPED if tallies and all(tally.skip for tally in tallies) else APPLIED

    def totals(self) -> Iterator[tuple[Bound, Tally]]:
        """Each calibration with its tally over all choices."""
        for index, bound in enumerate(self.admitted.bounds):
            yield bound, total(tallies[index] for tallies in self._tallies.values())

    def document(self) -> dict[str, Any]:
        """The `calibration` object of the response.

        Raises:
            NotApplied: a choice went through the engine uncounted.
        """
        if len(self._tallies) < self.expected_choices:
            raise NotApplied("the engine did not report that the request was calibrated")
        return {
            "digest": self.admitted.short_digest,
            "applied": [
                self._entry(index, bound, tally)
                for index, (bound, tally) in enumerate(self.totals())
            ],
        }

    def _entry(self, index: int, bound: Bound, tally: Tally) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "method": bound.method,
            "params": dict(bound.params),
            "profile": bound.profile,
            "layers": bound.layers,
            "heads": bound.heads if self._chosen(index) is None else tally.heads,
            **counts(tally),
        }
        if len(self._tallies) > 1:
            entry["choices"] = [
                self._choice(choice, self._tallies[choice][index])
                for choice in sorted(self._tallies)
            ]
        return entry

    def _chosen(self, index: int) -> int | None:
        """Heads chosen for a choice, None where settings alone say which."""
        return next((tallies[index].heads for tallies in self._tallies.values()), None)

    def _choice(self, choice: int, tally: Tally) -> dict[str, Any]:
        heads = {} if tally.heads is None else {"heads": tally.heads}
        return {"index": choice, **heads, **counts(tally)}


def total(tallies: Iterable[Tally]) -> Tally:
    """Tallies as one: sums, and what all have in common of what cannot be added."""
    parts = [*tallies]
    result = Tally()
    for tally in parts:
        result.prompt_tokens += 0 if tally.skip else tally.prompt_tokens
        result.completion_tokens += tally.completion_tokens
        result.count += tally.count
        _add(result.sums, tally.sums)
        _add(result.layer_sums, tally.layer_sums)
        _add(result.layer_counts, tally.layer_counts)
    if parts:
        first = parts[0]
        result.skipped = first.skip if all(tally.skip for tally in parts) else None
        result.heads = first.heads if all(t.heads == first.heads for t in parts) else None
        result.details = first.details if all(t.details == first.details for t in parts) else {}
    return result


def _add(totals: dict[str, Number], more: Mapping[str, Number]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0) + value


def statistics(tally: Tally) -> Mapping[str, float]:
    """Means over what was calibrated; empty where nothing was measured."""
    counts = tally.layer_counts
    means = {name: value / counts[name] for name, value in tally.layer_sums.items()}
    if tally.count:
        means |= {name: value / tally.count for name, value in tally.sums.items()}
    return means


def counts(tally: Tally) -> dict[str, Any]:
    """Counts, statistics and the reason of a skip as a receipt shows them."""
    return {
        "prompt_tokens": 0 if tally.skip else tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "statistics": {**statistics(tally), **tally.details},
        "skipped": tally.skip,
    }


class ReceiptDesk:
    """Open receipts by ticket; where reports from the engine find theirs."""

    def __init__(self) -> None:
        self._open: dict[str, Receipt] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, receipt: Receipt) -> dict[str, Any]:
        """Entry of `extra_args` for the receipt's next prompt."""
        entry = receipt.issue()
        self._open[receipt.tickets[-1]] = receipt
        return entry

    def get(self, ticket: str) -> Receipt | None:
        """The open receipt a ticket was issued for."""
        return self._open.get(ticket)

    def record(self, report: Report, choice: int) -> None:
        """Hand a report to its receipt; one that is closed already needs it no more."""
        receipt = self._open.get(report.ticket)
        if receipt is not None:
            receipt.record(report, choice)

    def close(self, receipt: Receipt) -> None:
        """Forget a receipt."""
        for ticket in receipt.tickets:
            self._open.pop(ticket, None)

    @contextmanager
    def closing(self, receipt: Receipt) -> Iterator[Receipt]:
        """Forget the receipt when the block is left."""
        try:
            yield receipt
        finally:
            self.close(receipt)
