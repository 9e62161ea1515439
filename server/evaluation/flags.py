"""Flags of the commands that measure on data. Imports nothing that is slow."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.flags import json_or_name, positive, whole

MAX_TOKENS = 8
CONCURRENCY = 8


def add_eval(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Add `trimtab eval`; the caller says what it runs."""
    parser = commands.add_parser(
        "eval",
        help="compare calibrations with the baseline on labelled data",
        description="Ask every sample plainly and with each calibration, and compare the answers.",
    )
    add_measuring(parser)
    parser.add_argument(
        "--calibration",
        type=json_or_name,
        action="append",
        default=[],
        metavar="JSON",
        help="a calibration to compare with the baseline; may be given several times",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results, report, plots"
    )
    parser.add_argument(
        "--split",
        choices=("report", "search", "all"),
        default="report",
        help="samples to ask (default: report)",
    )
    return parser


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the data, the server to ask, and how to ask it."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE.jsonl", help="labelled samples")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a running server; without it one is started and stopped")
    where.add_argument("--model", help="of the server that is started; default: the embedded one")
    add("--limit", type=positive, metavar="N", help="at most N samples, drawn by the seed")
    add_asking(parser, CONCURRENCY)


def add_asking(parser: argparse.ArgumentParser, concurrency: int) -> None:
    """Add how samples are asked, and the flags of a server that is started."""
    add = parser.add_argument
    add("--api-key", help="key of the running server")
    add(
        "--scoring",
        choices=("generate", "logprob"),
        help="let the model write, or weigh the choices; default: what the file asks for",
    )
    add(
        "--max-tokens",
        type=positive,
        default=MAX_TOKENS,
        metavar="N",
        help=f"that the model may write (default: {MAX_TOKENS})",
    )
    add(
        "--concurrency",
        type=positive,
        default=concurrency,
        metavar="N",
        help=f"samples under way at a time (default: {concurrency})",
    )
    add("--seed", type=whole, default=0, metavar="N", help="of splits, draws and intervals")
    add(
        "serve_flags",
        nargs="*",
        metavar="-- FLAG",
        help="flags of trimtab serve for the server that is started",
    )
