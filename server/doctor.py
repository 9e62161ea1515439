"""`trimtab doctor`: does calibration work on this server?"""

from __future__ import annotations


def main(url: str | None, api_key: str | None) -> int:
    """Run every check and print one line each; 0 if all pass."""
    raise NotImplementedError
