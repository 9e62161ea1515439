"""What calibration costs: plain requests against stock vLLM, calibrated against plain ones.

    python -m benchmarks.throughput --json out.json
    python -m benchmarks.throughput --calibration '{"method": "act", "heads": [1, 5]}' --starts 0
    python -m benchmarks.throughput --images --calibration '{"method": "vhr"}'

With `--images` the model is the embedded vision model, and every prompt is a picture.

Times depend on the machine; ratios are taken between rounds that ran next to each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import load
from benchmarks.figures import of_medians, table
from benchmarks.load import Pictures, Prompts, Round, Shape, Source
from benchmarks.servers import FLAGS, MAX_LENGTH, STOCK, TRIMTAB, Kind, running
from server import models
from server.overhead import machine
from server.overhead.spread import Spread, paired

SCENARIOS: Mapping[str, Shape] = {
    "decode-200": Shape(16, 200, 64),
    "decode-1500": Shape(16, 1500, 64),
    "prefill-1500": Shape(8, 1500, 1),
    "half-mixed": Shape(16, 200, 64, calibrated=0.5),
    "one-request": Shape(1, 200, 64),
}
IMAGE_TOKENS = 75  # of a picture and its question
IMAGES: Mapping[str, Shape] = {
    "images-decode": Shape(16, IMAGE_TOKENS, 256),
    "images-first-token": Shape(8, IMAGE_TOKENS, 1),
}
STOCK_SHAPE = SCENARIOS["decode-200"]
CALIBRATION = {"method": "zerotuning", "gamma": 0.5}
WARM_UP = Shape(4, 100, 8)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        model: checkpoint folder.
        dtype: of weights and KV cache.
        calibration: the request field, an object with `method`.
        scenarios: names of those to run.
        rounds: pairs per scenario.
        starts: starts of each server in the comparison with stock vLLM; 0 leaves it out.
        stock_rounds: rounds per start.
        images: whether prompts are pictures, of the embedded vision model.
    """

    model: Path
    dtype: str
    calibration: Mapping[str, Any]
    scenarios: tuple[str, ...]
    rounds: int
    starts: int
    stock_rounds: int
    images: bool = False

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The scenarios that there are, by name."""
        return IMAGES if self.images else SCENARIOS


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of the table.

    Attributes:
        name: of the scenario.
        reference: seconds per round of plain requests, or of stock vLLM.
        measured: seconds per round of what is compared with it.
        throughput: reference seconds over measured seconds; 1 costs nothing.
        latency: mean request latency, measured over reference; None where servers differ.
        calibration_share: share of the measured rounds spent in calibration, as the engine
            counts it.
    """

    name: str
    reference: list[float]
    measured: list[float]
    throughput: Spread
    latency: Spread | None = None
    calibration_share: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    args = _parser().parse_args(argv)
    plan = _plan(args)
    # The default action would leave a server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    described = machine.facts()
    results = run(plan, _progress)
    sys.stdout.write(f"{machine.sentence(described)}\n\n{report(results)}\n")
    if args.json:
        document = {
            "machine": described,
            "flags": [f"--dtype={plan.dtype}", f"--max-model-len={_length(plan)}", *FLAGS],
            "calibration": plan.calibration,
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and server starts")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the embedded one")
    parser.add_argument("--images", action="store_true", help="measure the vision model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calibration", type=json.loads, default=CALIBRATION, metavar="JSON")
    parser.add_argument(
        "--scenarios", help=f"comma-separated, of: {', '.join((*SCENARIOS, *IMAGES))}"
    )
    parser.add_argument("--rounds", type=int, help="pairs of rounds per scenario")
    parser.add_argument("--starts", type=int, help="server starts against stock vLLM; 0: none")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    known = IMAGES if args.images else SCENARIOS
    chosen = args.scenarios.split(",") if args.scenarios is not None else list(known)
    chosen = [name for name in chosen if name]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise SystemExit(f"no scenario {unknown[0]!r}; there are: {', '.join(known)}")
    quick = args.quick
    name = models.VISION_MODEL if args.images else models.DEFAULT_MODEL
    starts = 0 if args.images else 1 if quick else 3
    return Plan(
        model=args.model or models.prepare(name, report=_progress),
        dtype=args.dtype,
        calibration=args.calibration,
        scenarios=tuple(chosen),
        rounds=args.rounds or (3 if quick else 7),
        starts=args.starts if args.starts is not None else starts,
        stock_rounds=args.rounds or (3 if quick else 7),
        images=args.images,
    )


def run(plan: Plan, progress: Callable[[str], None]) -> list[Comparison]:
    """Every comparison of the plan, one server at a time."""
    results = [against_stock(plan, progress)] if plan.starts else []
    if plan.scenarios:
        progress("starting trimtab")
        with running(TRIMTAB, plan.model, plan.dtype, _length(plan)) as address:
            results += asyncio.run(against_plain(address, plan, progress))
    return results


def against_stock(plan: Plan, progress: Callable[[str], None]) -> Comparison:
    """Plain requests through Trimtab and through stock vLLM, started in turn."""
    seconds: dict[str, list[list[float]]] = {STOCK.name: [], TRIMTAB.name: []}
    for start in range(plan.starts):
        # The order changes every time, so that neither kind always runs on the warmer machine.
        kinds: list[Kind] = [STOCK, TRIMTAB] if start % 2 == 0 else [TRIMTAB, STOCK]
        for kind in kinds:
            progress(f"starting {kind.name} ({start + 1} of {plan.starts})")
            with running(kind, plan.model, plan.dtype, _length(plan)) as address:
                rounds = asyncio.run(_plain_rounds(address, plan, start))
            seconds[kind.name].append(rounds)
            progress(f"{kind.name}: {statistics.median(rounds):.2f} s per round")
    reference, measured = seconds[STOCK.name], seconds[TRIMTAB.name]
    return Comparison(
        "plain-vs-stock",
        [value for start in reference for value in start],
        [value for start in measured for value in start],
        of_medians(reference, measured),
    )


async def _plain_rounds(address: str, plan: Plan, seed: int) -> list[float]:
    prompts = _prompts(plan, seed)
    async with load.client_for(address) as client:
        shape = next(iter(IMAGES.values())) if plan.images else STOCK_SHAPE
        for first in (WARM_UP, shape):
            await load.play(client, load.bodies(first, prompts, None))
        return [
            (await load.play(client, load.bodies(shape, prompts, None))).seconds
            for _ in range(plan.stock_rounds)
        ]


async def against_plain(
    address: str, plan: Plan, progress: Callable[[str], None]
) -> list[Comparison]:
    """Calibrated and plain requests on one server, in alternating rounds."""
    prompts = _prompts(plan)
    results = []
    async with load.client_for(address) as client:
        for calibration in (None, plan.calibration) * 2:
            await load.play(client, load.bodies(WARM_UP, prompts, calibration))
        for name in plan.scenarios:
            results.append(await _scenario(client, name, plan, prompts))
            progress(f"{name}: {results[-1].throughput} of plain")
    return results


async def _scenario(
    client: httpx.AsyncClient, name: str, plan: Plan, prompts: Source
) -> Comparison:
    shape, method = plan.shapes[name], plan.calibration["method"]
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    spent = 0.0
    for pair in range(-1, plan.rounds):  # the pair before the first is not counted
        for calibrated in (False, True) if pair % 2 == 0 else (True, False):
            before = await load.calibration_seconds(client, method)
            calibration = plan.calibration if calibrated else None
            played = await load.play(client, load.bodies(shape, prompts, calibration))
            if pair >= 0:
                rounds[calibrated].append(played)
                spent += await load.calibration_seconds(client, method) - before
    return _compared(name, rounds[False], rounds[True], spent)


def _compared(
    name: str, plain: Sequence[Round], calibrated: Sequence[Round], spent: float
) -> Comparison:
    reference, measured = [r.seconds for r in plain], [r.seconds for r in calibrated]
    return Comparison(
        name,
        reference,
        measured,
        paired(reference, measured),
        paired([r.mean_latency for r in calibrated], [r.mean_latency for r in plain]),
        spent / sum(measured),
    )


def report(results: Sequence[Comparison]) -> str:
    """The results as a table; ratios with their smallest and largest value."""
    header = ("scenario", "reference s", "measured s", "throughput", "latency", "in calibration")
    return table(
        header,
        [
            (
                result.name,
                f"{statistics.median(result.reference):.3f}",
                f"{statistics.median(result.measured):.3f}",
                str(result.throughput),
                str(result.latency or ""),
                "" if result.calibration_share is None else f"{result.calibration_share:.1%}",
            )
            for result in results
        ],
    )


def _prompts(plan: Plan, seed: int = 0) -> Source:
    return Pictures(seed) if plan.images else Prompts(_vocabulary(plan.model), seed)


def _length(plan: Plan) -> int:
    """The longest sequence: shorter for the small vision model, which has no more positions."""
    return 1024 if plan.images else MAX_LENGTH


def _vocabulary(model: Path) -> int:
    size: int = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return size


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
