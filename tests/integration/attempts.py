"""Tests of what happens at a moment that a busy machine may miss.

A process that shares its cores with a server may get none for seconds: `connect()` has been seen to
return a second after the server had accepted, while requests ran on.
"""

from __future__ import annotations

from collections.abc import Callable

ATTEMPTS = 5


def in_time(attempt: Callable[[int], bool]) -> None:
    """Try until an attempt says that it caught the moment.

    What does not depend on the moment an attempt asserts itself, each time.
    """
    caught = any(attempt(number) for number in range(ATTEMPTS))
    assert caught, f"not once in {ATTEMPTS} attempts"
