"""Calibrators' code inside a worker, where an exception would end the engine for everybody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


def attempt(
    name: str, call: Callable[[], T], otherwise: str = "the requests concerned fail"
) -> T | None:
    """What `call` returns; None, with its traceback in the log, where it raises.

    Args:
        name: of the calibrator, for the log.
        call: runs the calibrator's code.
        otherwise: what becomes of it where it raises, for the log.
    """
    try:
        return call()
    except Exception:
        logger.exception("calibrator %s raised; %s", name, otherwise)
        return None
