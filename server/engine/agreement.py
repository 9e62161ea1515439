"""What tensor-parallel ranks agree on when a request arrives: whether it takes part, and how.

Calibrators' code may fail on one rank alone. But all have to know the same requests: what they did
is added up row by row, and where they gather, one that is not there leaves the others waiting for
ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from calibrators.capabilities import across_heads

if TYPE_CHECKING:
    from server.engine.programs import Program
    from server.engine.ranks import Gather
    from server.engine.requests import CalibratedRequest

FAILED = -1.0


def settle(requests: Iterable[CalibratedRequest | None], gather: Gather) -> None:
    """Have all ranks agree on the new requests of a step, in its order; None for plain ones.

    One that failed on any rank, or came out differently, fails on all and takes part in nothing.
    """
    new = [request for request in requests if request is not None]
    if not new:
        return
    signatures = gather(torch.tensor([signature(request) for request in new]).view(-1, 1, 1))
    agreed = (signatures == signatures[:, :1]).all(1) & (signatures != FAILED).all(1)
    for request, same in zip(new, agreed.flatten().tolist(), strict=True):
        if not same:
            request.failed, request.programs = True, []


def signature(request: CalibratedRequest) -> float:
    """Equal on ranks that will do the same; 24 bits, which float32 holds."""
    if request.failed:
        return FAILED
    parts = [(program.rows, *_gathered(program)) for program in request.programs]
    return float(zlib.crc32(repr(parts).encode()) >> 8)


def _gathered(program: Program) -> tuple[list[bool], list[bool]]:
    """In which layers ranks gather, and where also sums of weights."""
    if not across_heads(program.calibrator):
        return [], []
    return program.active.tolist(), [pools.weighted for pools in program.pools]
