"""Flags of `trimtab profile`. Imports nothing that is slow."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from server.evaluation.flags import add_asking
from server.flags import positive
from server.profiling import act, gift, var, zerotuning

# More than `trimtab eval` has: nothing here is timed, and full batches are what makes it quick.
CONCURRENCY = 64

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_profile(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `trimtab profile METHOD`, which runs `run`."""
    parser = commands.add_parser(
        "profile",
        help="find heads, layers and strength of a method for a model and data",
        description="Search on one part of the data, measure on the other, write a profile.",
    )
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for add in (_add_zerotuning, _add_act, _add_var, _add_gift):
        add(methods).set_defaults(run=run)


def _add_zerotuning(methods: Commands) -> argparse.ArgumentParser:
    parser = methods.add_parser("zerotuning", help="query heads and one gamma")
    add = parser.add_argument
    add(
        "--probe-gamma",
        type=_number("a number above 1, up to 100", lambda x: 1 < x <= 100),
        default=zerotuning.PROBE,
        metavar="GAMMA",
        help=f"that every head is probed with (default: {zerotuning.PROBE:g})",
    )
    add(
        "--top",
        type=_number("a number above 0, up to 1", lambda x: 0 < x <= 1),
        default=zerotuning.TOP,
        metavar="SHARE",
        help=f"largest share of the heads that are tuned (default: {zerotuning.TOP:g})",
    )
    add(
        "--grid",
        type=_numbers("numbers above 0, up to 100", lambda x: 0 < x <= 100),
        default=zerotuning.GRID,
        metavar="GAMMA,...",
        help="gammas to choose from (default: 0.3 to 6.5)",
    )
    add(
        "--unsupervised",
        action="store_true",
        help="choose by the entropy of the next token; the data needs no answers",
    )
    return _with_common(parser)


def _add_act(methods: Commands) -> argparse.ArgumentParser:
    parser = methods.add_parser("act", help="(layer, head) pairs and one beta")
    add = parser.add_argument
    beta = "from 0 to 1"
    add(
        "--probe-beta",
        type=_number(f"a number {beta}", lambda x: 0 <= x <= 1),
        default=act.PROBE,
        metavar="BETA",
        help=f"that every pair is probed with (default: {act.PROBE:g})",
    )
    add(
        "--grid",
        type=_numbers(f"numbers {beta}", lambda x: 0 <= x <= 1),
        default=act.GRID,
        metavar="BETA,...",
        help="betas to choose from (default: 0 to 0.8)",
    )
    add(
        "--alpha",
        type=_number("a number above 0", lambda x: x > 0),
        help="what makes a sink; default: the method's",
    )
    add(
        "--screen",
        type=positive,
        default=act.SCREEN,
        metavar="N",
        help=f"pairs that are probed, those with the heaviest sinks (default: {act.SCREEN})",
    )
    add(
        "--screen-samples",
        type=positive,
        default=act.SCREEN_SAMPLES,
        metavar="N",
        help=f"that sinks are looked for in (default: {act.SCREEN_SAMPLES})",
    )
    return _with_common(parser)


def _add_var(methods: Commands) -> argparse.ArgumentParser:
    parser = methods.add_parser("var", help="channels that mark sinks, tau, rho and share")
    _add_sinks(parser)
    add = parser.add_argument
    share = "from 0 to 1"
    add(
        "--rhos",
        type=_numbers(f"numbers {share}", lambda x: 0 <= x <= 1),
        default=var.RHOS,
        metavar="RHO,...",
        help="rhos to choose from (default: 0.5, 0.8, 0.9)",
    )
    add(
        "--probe-share",
        type=_number("a number above 0, up to 1", lambda x: 0 < x <= 1),
        default=var.PROBE,
        metavar="SHARE",
        help=f"that every rho is probed with (default: {var.PROBE:g})",
    )
    add(
        "--grid",
        type=_numbers(f"numbers {share}", lambda x: 0 <= x <= 1),
        default=var.GRID,
        metavar="SHARE,...",
        help="shares to choose from (default: 0.2 to 1)",
    )
    return _with_common(parser)


def _add_sinks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--sink-dims",
        type=_channels,
        metavar="D,...",
        help="channels that mark sinks; without them the model is loaded to look for some",
    )
    add(
        "--tau",
        type=_number("a number above 0", lambda x: 0 < x < math.inf),
        help=f"what makes a sink; default: what parts them, {var.TAU:g} with --sink-dims",
    )
    add(
        "--observe-samples",
        type=positive,
        default=var.OBSERVED,
        metavar="N",
        help=f"that channels are looked for in (default: {var.OBSERVED})",
    )
    add(
        "--peak",
        type=_number("a number above 1", lambda x: x > 1),
        default=var.PEAK,
        metavar="RMS",
        help=f"root mean squares that tokens have to stand out by (default: {var.PEAK:g})",
    )


def _add_gift(methods: Commands) -> argparse.ArgumentParser:
    parser = methods.add_parser("gift", help="the layer of the saliency map and its strength")
    add = parser.add_argument
    add(
        "--probe-alpha",
        type=_number("a number above 0, up to 10", lambda x: 0 < x <= 10),
        default=gift.PROBE,
        metavar="ALPHA",
        help=f"that every layer is probed with (default: {gift.PROBE:g})",
    )
    add(
        "--grid",
        type=_numbers("numbers from 0 to 10", lambda x: 0 <= x <= 10),
        default=gift.GRID,
        metavar="ALPHA,...",
        help="alphas to choose from (default: 1 to 8)",
    )
    return _with_common(parser)


def _with_common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE.jsonl", help="labelled samples")
    add("--out", type=Path, required=True, metavar="PROFILE.json", help="the profile to write")
    add("--url", help="a running server; without it one is started and stopped")
    add("--model", help="of the server that is started, or that --url has to serve")
    add(
        "--samples",
        type=positive,
        metavar="N",
        help="at most N samples to search with, drawn by the seed",
    )
    add(
        "--report-samples",
        type=positive,
        metavar="N",
        help="at most N samples to report on, drawn by the seed",
    )
    add(
        "--state",
        type=Path,
        metavar="FILE",
        help="measurements so far, to go on from; default: PROFILE.json.partial.jsonl",
    )
    add_asking(parser, CONCURRENCY)
    return parser


def _channels(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"numbers of channels are needed, not {text!r}")
    return tuple(sorted(set(map(int, numbers))))


def _number(allowed: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{allowed} is needed, not {text!r}")
        return value

    return parse


def _numbers(allowed: str, fits: Callable[[float], bool]) -> Callable[[str], tuple[float, ...]]:
    one = _number(allowed, fits)

    def parse(text: str) -> tuple[float, ...]:
        return tuple(sorted({one(part) for part in text.split(",")}))

    return parse
