"""One streamed request and how long its tokens took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.evaluation.api import Api, ApiFailure, Calibration, Receipt, member
from server.overhead.prompts import Source


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured of a request.

    Attributes:
        ttft: seconds until the first token.
        tpot: mean seconds of every further token; None where there was none.
        prompt_tokens: as the server counts them.
        output_tokens: the same.
        digest: of the receipt; None for a plain request.
    """

    ttft: float
    tpot: float | None
    prompt_tokens: int
    output_tokens: int
    digest: str | None


async def timed(
    api: Api, source: Source, fields: Mapping[str, Any], calibration: Calibration, tokens: int
) -> Timing:
    """Ask for exactly `tokens` tokens; plain where `calibration` is None.

    Raises:
        ApiFailure: the answer is an error, has other lengths than asked for, or is not calibrated
            as asked.
    """
    body = {
        **fields,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    moments: list[float] = []
    usage = receipt = None
    started = time.perf_counter()
    async with aclosing(api.stream(source.path, calibration, **body)) as chunks:
        async for chunk in chunks:
            receipt = chunk.get("calibration", receipt)
            usage = chunk.get("usage") or usage
            if chunk.get("choices"):
                moments.append(time.perf_counter() - started)
    written, read = (int(member(usage, f"{kind}_tokens")) for kind in ("completion", "prompt"))
    if not moments or written != tokens or read != (source.length or read):
        raise ApiFailure(f"{read} prompt tokens gave {written} in {len(moments)} chunks")
    further = (moments[-1] - moments[0]) / (tokens - 1) if tokens > 1 else None
    digest = _digest(api.checked(receipt, calibration))
    return Timing(moments[0], further, read, written, digest)


def _digest(receipt: Receipt | None) -> str | None:
    """Of a receipt that says that something was calibrated; None for a plain request."""
    if receipt is None:
        return None
    if receipt.skipped:
        raise ApiFailure(f"a request was left alone by a method: {receipt.skipped[0]}")
    if not receipt.tokens:
        raise ApiFailure("a receipt counts no calibrated token")
    return receipt.digest
