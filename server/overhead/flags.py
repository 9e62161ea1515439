"""Flags of `trimtab bench`, where they can be those of `vllm bench serve`. Imports nothing slow."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.flags import json_or_name, positive, whole

CONCURRENCY = 8
INPUT_TOKENS = 256
OUTPUT_TOKENS = 64
ROUNDS = 5


def add_bench(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Add `trimtab bench`; the caller says what it runs."""
    parser = commands.add_parser(
        "bench",
        help="measure what each calibrator costs against plain requests",
        description="Send rounds of plain requests and of each calibration in turn, and compare.",
    )
    _add_server(parser)
    _add_load(parser)
    add = parser.add_argument
    add(
        "--calibration",
        type=json_or_name,
        action="append",
        default=[],
        metavar="JSON",
        help="a calibration to measure, or its name; may be given several times; "
        "default: every calibrator that the model can use as it is",
    )
    add("--output", type=Path, metavar="FILE.json", help="file for all figures")
    add(
        "serve_flags",
        nargs="*",
        metavar="-- FLAG",
        help="flags of trimtab serve for the server that is started",
    )
    return parser


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", help="a running server; without it one is started and stopped")
    add("--api-key", help="key of the running server")
    add(
        "--model",
        help="of the server that is started, or that --url has to serve; default: the embedded one",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def count(flag: str, default: int | None, text: str) -> None:
        add(flag, type=positive, default=default, metavar="N", help=text)

    count("--max-concurrency", CONCURRENCY, f"requests at a time (default: {CONCURRENCY})")
    count("--num-prompts", None, "requests in a round (default: as many as at a time)")
    count(
        "--input-len",
        INPUT_TOKENS,
        f"tokens of a prompt (default: {INPUT_TOKENS}); with a picture, about as many beside it",
    )
    count("--output-len", OUTPUT_TOKENS, f"tokens that are generated (default: {OUTPUT_TOKENS})")
    count("--rounds", ROUNDS, f"of each kind of request (default: {ROUNDS})")
    add("--seed", type=whole, default=0, metavar="N", help="of prompts and pictures")
    add(
        "--text-only",
        action="store_true",
        help="send no pictures to a model that takes them",
    )
