"""What tensor-parallel ranks agree on when a request arrives: whether it takes part, and how.

Calibrators' code may fail on one rank alone. But all have to know the same requests: what they did
is added up row by row, and where they gather, one that is not there leaves the others waiting for
ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
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
    made = [None if request.failed else request.programs for request in new]
    for request, same in zip(new, agreed(made, gather), strict=True):
        if not same:
            request.failed, request.programs = True, []


def agreed(made: Sequence[Sequence[Program] | None], gather: Gather) -> list[bool]:
    """Which entries all ranks have, and have alike; None stands for what failed on this one."""
    signatures = gather(torch.tensor([_signature(programs) for programs in made]).view(-1, 1, 1))
    same = (signatures == signatures[:, :1]).all(1) & (signatures != FAILED).all(1)
    return [bool(each) for each in same.flatten()]


def _signature(programs: Sequence[Program] | None) -> float:
    """Equal on ranks that will do the same; 24 bits, which float32 holds."""
    if programs is None:
        return FAILED
    parts = [(program.rows, *_gathered(program)) for program in programs]
    return float(zlib.crc32(repr(parts).encode()) >> 8)


def _gathered(program: Program) -> tuple[list[bool], list[bool]]:
    """In which layers ranks gather, and where also sums of weights."""
    if not across_heads(program.calibrator):
        return [], []
    return program.active.tolist(), [pools.weighted for pools in program.pools]
