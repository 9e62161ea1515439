"""State of one API server process: what its routes share."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.admission import Admission, Admitted
from server.aliases import Alias
from server.engine.payload import Report
from server.metrics import Metrics
from server.middleware.keys import TENANT
from server.receipts import Receipt, ReceiptDesk

if TYPE_CHECKING:
    from fastapi import Request


@dataclass
class FrontEnd:
    """Admission, receipts and metrics of one process.

    Attributes:
        admission: of requests to the served model.
        metrics: of this process.
        salt_key: secret of cache salts, the same in all API servers of an engine.
        aliases: model names that stand for a preset.
        desk: open receipts.
        draining: set when shutdown has begun.
        capacity: requests served at once, running and queued; more are refused.
    """

    admission: Admission
    metrics: Metrics
    salt_key: bytes
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    desk: ReceiptDesk = field(default_factory=ReceiptDesk)
    draining: bool = False
    capacity: int = sys.maxsize

    def open(self, admitted: Admitted, choices: int) -> Receipt:
        """A receipt for a request that is about to run."""
        receipt = Receipt(admitted, choices)
        self.metrics.opened(receipt)
        return receipt

    def close(self, receipt: Receipt, *, answered: bool) -> None:
        """The request is over."""
        self.desk.close(receipt)
        self.metrics.closed(receipt, answered=answered)

    def withdraw(self, receipt: Receipt) -> None:
        """The request is refused after all."""
        self.desk.close(receipt)
        self.metrics.withdrawn(receipt)

    def check_prompt(self, ticket: str, length: int) -> None:
        """See a prompt, tokenised, before the engine does.

        Raises:
            Refusal: the calibration it asks for cannot take a prompt of this length.
        """
        receipt = self.desk.get(ticket)
        if receipt is not None:
            self.admission.check_prompt(receipt.admitted, length)

    def report(self, report: Report, choice: int) -> None:
        """A report came from the engine, `choice` counted within its prompt."""
        self.desk.record(report, choice)
        self.metrics.stepped(report)

    def cache_salt(
        self, admitted: Admitted, user_salt: str | None, raw_request: Request
    ) -> str | None:
        """Cache salt of a calibrated request; different for every API key."""
        return admitted.cache_salt(self.salt_key, _tenant(raw_request), user_salt)


def _tenant(raw_request: Request) -> str:
    """Digest of the key a request was let in with; of its header where nothing checks keys here.

    A proxy may check them instead.
    """
    verified: str | None = raw_request.scope.get(TENANT)
    if verified is not None:
        return verified
    header = raw_request.headers.get("Authorization", "")
    return hashlib.sha256(header.encode()).hexdigest() if header else ""
