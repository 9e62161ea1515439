"""What a vision model says about objects that are not there, plain and under calibrations.

    trimtab serve shapes-llava --port 8000
    python -m benchmarks.hallucination --url http://127.0.0.1:8000 --json out.json
    python -m benchmarks.hallucination --url ... --calibration '{"method": "vhr", "alpha": 2}'

Two sets of scenes: `usual` ones are like those the model was trained on, `broken` ones lack an
object that nearly always came with another. Captions are judged after CHAIR, yes/no questions
after POPE. Calibrations answer the same questions as the plain model, and are compared with it on
the same scenes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.answers import Asker, AskError, Question
from benchmarks.examination import Examination, examine, prepare
from benchmarks.figures import table
from benchmarks.intervals import difference, figure
from benchmarks.objects import Share

PLAIN = "plain"
# What the table shows; the JSON has everything.
COLUMNS = (
    "usual.exact",
    "usual.chair_s",
    "broken.chair_s",
    "broken.chair_i",
    "broken.recall",
    "random.accuracy",
    "popular.accuracy",
    "adversarial.accuracy",
    "adversarial.f1",
)


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one way to answer.

    Attributes:
        calibration: the request field; None for plain requests.
        skipped: answers whose receipt says that a method did nothing.
        shares: by the name of the figure.
    """

    calibration: Any
    skipped: int
    shares: Mapping[str, Share]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    args = _parser().parse_args(argv)
    examination = prepare(args.scenes, args.seed)
    try:
        results = asyncio.run(run(args, examination, _progress))
    except AskError as error:
        raise SystemExit(str(error)) from error
    sys.stdout.write(f"{report(results)}\n")
    if args.json:
        document = {
            "model": args.model,
            "scenes": args.scenes,
            "seed": args.seed,
            "results": described(results),
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hallucination", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a running server")
    parser.add_argument("--model", default="shapes-llava", help="its name there")
    parser.add_argument("--api-key", help="key of that server")
    parser.add_argument(
        "--calibration",
        type=json.loads,
        action="append",
        default=[],
        metavar="JSON",
        help="the request field; may be given several times",
    )
    parser.add_argument("--scenes", type=int, default=300, help="of each of the two sets")
    parser.add_argument("--seed", type=int, default=1234, help="of scenes and questions")
    parser.add_argument("--parallel", type=int, default=16, help="requests at a time")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


async def run(
    args: argparse.Namespace, examination: Examination, progress: Callable[[str], None]
) -> list[Result]:
    """Every way to answer, plain first.

    Raises:
        AskError: the server refuses a request or does not answer.
    """
    results = []
    async with Asker(args.url, args.model, args.api_key, args.parallel) as asker:
        for calibration in (None, *args.calibration):
            name = label(calibration)
            progress(f"{name}: {len(examination.questions)} questions")
            results.append(await _answered(asker, examination, calibration))
    return results


async def _answered(asker: Asker, examination: Examination, calibration: Any) -> Result:  # noqa: ANN401
    questions = [Question(each.picture, each.text) for each in examination.questions]
    answers = await asker.ask(questions, calibration)
    shares = examine(examination, [answer.text for answer in answers])
    return Result(calibration, sum(answer.skipped for answer in answers), shares)


def label(calibration: Any) -> str:  # noqa: ANN401
    """The calibration on one line."""
    return PLAIN if calibration is None else json.dumps(calibration)


def described(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results for JSON: each figure with its interval, and its difference from plain."""
    plain = results[0].shares
    return [
        {
            "calibration": result.calibration,
            "skipped": result.skipped,
            "figures": {name: asdict(figure(share)) for name, share in result.shares.items()},
            "differences": {
                name: asdict(difference(share, plain[name]))
                for name, share in result.shares.items()
                if result is not results[0]
            },
        }
        for result in results
    ]


def report(results: Sequence[Result]) -> str:
    """Tables of figures, and of their differences from the plain ones where there are others."""
    rows = [[name, *(str(figure(result.shares[name])) for result in results)] for name in COLUMNS]
    lines = [table(["figure", *(label(result.calibration) for result in results)], rows)]
    plain, *others = results
    if others:
        changes = [
            [name, *(str(difference(r.shares[name], plain.shares[name])) for r in others)]
            for name in COLUMNS
        ]
        header = ["minus plain", *(label(result.calibration) for result in others)]
        lines.append(table(header, changes))
    return "\n\n".join(lines)


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
