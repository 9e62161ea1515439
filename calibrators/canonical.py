"""Canonical form and digest of resolved calibrations: what makes two requests the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from calibrators.interface import Bound

RECEIPT_DIGITS = 12


def canonical_json(calibrations: Sequence[tuple[Bound, int]], model: str) -> str:
    """Equal for equal resolved settings on the same model, different otherwise.

    Args:
        calibrations: each bound calibration with its method's `revision`, in the order they
            are applied.
        model: identity of the served model.
    """
    form = {
        "model": model,
        "calibrations": [
            {"method": bound.method, "revision": revision, "params": bound.params}
            for bound, revision in calibrations
        ],
    }
    return json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(canonical: str) -> str:
    """SHA-256 of a canonical form in hex, 64 digits; receipts show `RECEIPT_DIGITS` of them."""
    return hashlib.sha256(canonical.encode()).hexdigest()
