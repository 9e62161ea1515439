"""State of one API server process: what its routes share."""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.admission import Admission, Admitted
from server.aliases import Alias
from server.engine.geometry import Geometry
from server.engine.payload import Report
from server.engine.preludes import Preludes
from server.metrics import Metrics
from server.middleware.drain import Gate
from server.middleware.keys import CURRENT, TENANT
from server.middleware.request_log import FAILED, Record
from server.receipts import Receipt, ReceiptDesk
from server.vision import check_images

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
        preludes: text passes that run.
        gate: that requests come in through, closed when shutdown begins.
        capacity: requests served at once, running and queued; more are refused.
    """

    admission: Admission
    metrics: Metrics
    salt_key: bytes
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    desk: ReceiptDesk = field(default_factory=ReceiptDesk)
    preludes: Preludes = field(default_factory=Preludes)
    gate: Gate = field(default_factory=Gate)
    capacity: int = sys.maxsize

    def open(self, admitted: Admitted, choices: int, log: Record | None = None) -> Receipt:
        """A receipt for a request that is about to run; `log` will tell how it ended."""
        receipt = Receipt(admitted, choices, log)
        self.metrics.opened(receipt)
        return receipt

    def close(self, receipt: Receipt, *, answered: bool) -> None:
        """The request is over."""
        self.desk.close(receipt)
        self.metrics.closed(receipt, answered=answered)
        if receipt.log is not None:
            receipt.log.outcome = receipt.outcome if answered else FAILED

    def withdraw(self, receipt: Receipt) -> None:
        """The request is refused after all."""
        self.desk.close(receipt)
        self.metrics.withdrawn(receipt)

    def check_prompt(self, ticket: str, geometry: Geometry) -> None:
        """See a prompt, tokenised, before the engine does.

        Raises:
            Refusal: the calibration it asks for cannot take such a prompt.
        """
        receipt = self.desk.get(ticket)
        if receipt is not None:
            check_images(self.admission.calibrators, receipt.admitted, geometry)
            self.admission.check_prompt(receipt.admitted, geometry.prompt.length)

    def report(self, report: Report, choice: int) -> None:
        """A report came from the engine, `choice` counted within its prompt."""
        if not self.preludes.take(report):
            self.desk.record(report, choice)
        self.metrics.stepped(report)

    def attributes(self, report: Report) -> Mapping[str, str | int]:
        """What a request's span tells of its calibration; nothing of a text pass."""
        receipt = self.desk.get(report.ticket)
        if receipt is None:
            return {}
        # Several methods calibrate the same rows.
        prompt, completion = (
            max((getattr(tally, name) for tally in report.tallies), default=0)
            for name in ("prompt_tokens", "completion_tokens")
        )
        return {
            "trimtab.calibration.methods": "+".join(receipt.admitted.methods),
            "trimtab.calibration.digest": receipt.admitted.short_digest,
            "trimtab.calibration.outcome": FAILED if report.failed else receipt.outcome,
            "trimtab.calibration.prompt_tokens": prompt,
            "trimtab.calibration.completion_tokens": completion,
        }

    def cache_salt(
        self, admitted: Admitted, user_salt: str | None, raw_request: Request
    ) -> str | None:
        """Cache salt of a calibrated request; different for every API key."""
        return admitted.cache_salt(self.salt_key, _tenant(raw_request), user_salt)

    def tenant_salt(self, salt: str | None) -> str | None:
        """Cache salt of a request, calibrated or not, that no other key's requests can have."""
        tenant = CURRENT.get()
        if tenant is None:
            return salt
        parts = json.dumps(["tenant", tenant, salt]).encode()
        return hmac.new(self.salt_key, parts, hashlib.sha256).hexdigest()


def _tenant(raw_request: Request) -> str:
    """Digest of the key a request was let in with; of its header where nothing checks keys here.

    A proxy may check them instead.
    """
    verified: str | None = raw_request.scope.get(TENANT)
    if verified is not None:
        return verified
    header = raw_request.headers.get("Authorization", "")
    return hashlib.sha256(header.encode()).hexdigest() if header else ""
