"""Probing every head on many samples: all pairs through one server, against one pair at a time.

    python -m benchmarks.search --json out.json

Both sides ask the same engine in one run. One at a time is how research scripts do it; it is
measured on pairs drawn at random, half of them before the other side and half after it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.figures import table
from benchmarks.servers import FLAGS, TRIMTAB, running
from server import models
from server.evaluation.api import Api, connected, member
from server.evaluation.samples import Sample, draw, read
from server.evaluation.scoring import Generate, Logprob, Scorer
from server.overhead import machine
from server.profiling import zerotuning
from server.profiling.pairs import Pairs
from server.profiling.questions import Answers
from server.profiling.search import BASELINE, Candidate, Stage
from server.profiling.state import opened

# Prompts of about 30 tokens, answers of one.
DATA = Path(__file__).parents[1] / "examples" / "data" / "topic.jsonl"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        data: file of labelled samples.
        samples: that every head is probed on.
        concurrency: pairs under way at a time on the one side.
        drawn: pairs that are measured one at a time.
        scoring: generate or logprob.
        max_tokens: that the model may write.
    """

    data: Path
    samples: int
    concurrency: int
    drawn: int
    scoring: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds for a number of pairs."""

    pairs: int
    seconds: float

    @property
    def per_pair(self) -> float:
        """Seconds."""
        return self.seconds / self.pairs


@dataclass(frozen=True, slots=True)
class Comparison:
    """The search together, and one pair at a time before and after it."""

    together: Speed
    alone: tuple[Speed, Speed]

    @property
    def one_by_one(self) -> Speed:
        """All pairs that were measured one at a time."""
        return Speed(sum(s.pairs for s in self.alone), sum(s.seconds for s in self.alone))

    @property
    def ratio(self) -> float:
        """How many times as long the search would take one at a time."""
        return self.one_by_one.per_pair / self.together.per_pair


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    args = _parser().parse_args(argv)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    # The default action would leave a server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    described = machine.facts()
    model = args.model or models.prepare(models.DEFAULT_MODEL, report=_progress)
    with running(TRIMTAB, model, args.dtype) as address:
        found = asyncio.run(compared(address, plan))
    sys.stdout.write(f"{machine.sentence(described)}\n\n{report(found)}\n")
    if args.json:
        document = {
            "machine": described,
            "flags": [f"--dtype={args.dtype}", *FLAGS],
            "plan": asdict(plan) | {"data": plan.data.name},
            "result": {**asdict(found), "ratio": found.ratio},
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the embedded one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", type=Path, default=DATA, help="labelled samples")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--drawn", type=int, default=60, help="pairs measured one at a time")
    parser.add_argument("--scoring", choices=("generate", "logprob"), default="generate")
    parser.add_argument("--max-tokens", type=int, default=8)
    return parser


async def compared(address: str, plan: Plan) -> Comparison:
    """Both sides on the server at `address`."""
    async with connected(address, trust_env=False) as api:
        heads = member(await api.get("/v1/calibration/profiles"), "model", "query_heads")
        candidates = _probes(int(heads))
        samples = draw(read(plan.data).samples, plan.samples)
        pairs = [(candidate, sample) for candidate in candidates for sample in samples]
        drawn = random.Random(0).sample(pairs, plan.drawn)
        half = len(drawn) // 2
        await _seconds(api, plan, candidates, samples[:4])  # warms the server up
        before = await _one_at_a_time(api, plan, drawn[:half])
        together = await _seconds(api, plan, candidates, samples)
        after = await _one_at_a_time(api, plan, drawn[half:])
    return Comparison(together, (before, after))


def _probes(heads: int) -> tuple[Candidate, ...]:
    """The probes that the search itself begins with."""
    first = next(zerotuning.search(zerotuning.Plan(heads)))
    return tuple(candidate for candidate in first.candidates if candidate is not BASELINE)


async def _seconds(
    api: Api, plan: Plan, candidates: tuple[Candidate, ...], samples: Sequence[Sample]
) -> Speed:
    """As `trimtab profile` asks them, with a state file."""
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder, "state"), {}) as state:
        asked = Pairs({"answers": Answers(_scorer(api, plan))}, state, plan.concurrency, _bar)
        stage = Stage("probe", "answers", candidates)
        started = time.perf_counter()
        await asked.measure(stage, samples)
        speed = Speed(len(candidates) * len(samples), time.perf_counter() - started)
    _progress(f"together: {speed.pairs} pairs in {speed.seconds:.1f} s")
    return speed


async def _one_at_a_time(api: Api, plan: Plan, pairs: Sequence[tuple[Candidate, Sample]]) -> Speed:
    question = Answers(_scorer(api, plan))
    started = time.perf_counter()
    for candidate, sample in pairs:
        await question.ask(sample, candidate.calibration)
    speed = Speed(len(pairs), time.perf_counter() - started)
    _progress(f"one at a time: {speed.pairs} pairs in {speed.seconds:.1f} s")
    return speed


def _scorer(api: Api, plan: Plan) -> Scorer:
    return Logprob(api) if plan.scoring == "logprob" else Generate(api, plan.max_tokens)


@contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Callable[[], object]]:  # noqa: ARG001
    yield lambda: None


def report(found: Comparison) -> str:
    """The result as a table."""
    alone = found.one_by_one
    scaled = alone.per_pair * found.together.pairs
    parts = ", ".join(f"{1000 * part.per_pair:.0f}" for part in found.alone)
    rows = [
        ("together", found.together, f"{found.together.seconds:.1f}", ""),
        ("one at a time", alone, f"{scaled:.1f} (scaled)", f"before, after: {parts} ms"),
    ]
    lines = [
        (name, str(speed.pairs), f"{1000 * speed.per_pair:.1f}", whole, remark)
        for name, speed, whole, remark in rows
    ]
    header = ("pairs", "measured", "ms per pair", "s for the search", "")
    return f"{table(header, lines)}\n\nratio {found.ratio:.2f}"


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
