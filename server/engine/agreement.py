"""What tensor-parallel ranks agree on before they gather: which requests take part, and how.

A rank that is not there where the others gather leaves them waiting for ever. Calibrators' code may
fail on one rank alone, so whether and how a request takes part is compared once, when it arrives.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from calibrators.interface import across_heads

if TYPE_CHECKING:
    from server.engine.ranks import Gather
    from server.engine.requests import CalibratedRequest

FAILED = -1.0


def settle(requests: Iterable[CalibratedRequest | None], gather: Gather) -> None:
    """Have all ranks agree on new requests, None for plain ones; in the scheduler's order.

    One that failed on any rank, or came out differently, fails on all and takes part in nothing.
    """
    new = [request for request in requests if request is not None and request.gathers]
    if not new:
        return
    signatures = gather(torch.tensor([signature(request) for request in new]).view(-1, 1, 1))
    agreed = (signatures == signatures[:, :1]).all(1) & (signatures != FAILED).all(1)
    for request, same in zip(new, agreed.flatten().tolist(), strict=True):
        if not same:
            request.failed, request.programs = True, []


def signature(request: CalibratedRequest) -> float:
    """Equal on ranks that will gather alike; 24 bits, which float32 holds."""
    if request.failed:
        return FAILED
    parts = [
        (program.rows, program.active.tolist(), [pools.weighted for pools in program.pools])
        for program in request.programs
        if across_heads(program.calibrator)
    ]
    return float(zlib.crc32(repr(parts).encode()) >> 8)
