"""`trimtab eval`: does a calibration help on this data?"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server import own_server
from server.admission import OFF
from server.evaluation import plots
from server.evaluation.api import Api, ApiFailure, Calibration, connected
from server.evaluation.comparison import Row, compare, named
from server.evaluation.report import Results
from server.evaluation.samples import DataError, Dataset, Sample, Scoring, draw, read
from server.evaluation.scoring import Generate, Logprob, Scorer

RESULTS = "results.json"
REPORT = "report.md"


class Unusable(Exception):
    """Arguments that make no evaluation; says why."""


def main(args: argparse.Namespace) -> int:
    """Compare, print the table, write results, report and plots.

    Returns:
        0; 1 where a calibration, or the baseline, has no result; 2 where nothing could be asked.
    """
    try:
        data = read(args.data)
        samples = draw(data.part(args.split, args.seed), args.limit, args.seed)
        check_calibrations(args.calibration)
        _make_room(args.out)
        results = _measured(args, data, samples)
    except (DataError, Unusable, ApiFailure, own_server.StartFailed) as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    print(f"{results.table()}\n\n{results.summary()}")
    _write(results, args.out)
    return 1 if any(row.error is not None for row in results.rows) else 0


def check_calibrations(calibrations: Sequence[Calibration]) -> None:
    """Refuse what is no comparison with the baseline.

    Raises:
        Unusable: one is the baseline itself, or occurs twice.
    """
    seen = []
    for calibration in calibrations:
        if calibration is None or calibration == OFF:
            raise Unusable(f"--calibration {json.dumps(calibration)}: the baseline is always there")
        if calibration in seen:
            raise Unusable(f"--calibration {named(calibration)}: given twice")
        seen.append(calibration)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The address to ask: that of `--url`, or of a server that runs for the block.

    Raises:
        Unusable: flags for a server that is not started here.
        StartFailed: of `own_server`.
    """
    flags = args.serve_flags
    if args.url is not None:
        if flags:
            raise Unusable(f"{flags[0]}: the server at --url has its flags already")
        yield args.url
        return
    if flags and not flags[0].startswith("-"):
        raise Unusable(f"{flags[0]}: is no flag of trimtab serve; --model names a model")
    # The default action would leave the server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with own_server.running(
            progress, api_key=args.api_key, model=args.model, flags=flags
        ) as address:
            yield address
    finally:
        signal.signal(signal.SIGTERM, before)


def scorer(args: argparse.Namespace, data: Dataset, api: Api) -> Scorer:
    """The way of scoring that flags and data ask for."""
    if _scoring(args, data) == "logprob":
        return Logprob(api)
    return Generate(api, args.max_tokens)


def progress(line: str) -> None:
    """Tell how far it is; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def _scoring(args: argparse.Namespace, data: Dataset) -> Scoring:
    return args.scoring or data.scoring


def _measured(args: argparse.Namespace, data: Dataset, samples: Sequence[Sample]) -> Results:
    with served(args) as address:
        api_facts, rows = asyncio.run(_asked(args, data, samples, address))
    return Results(_facts(args, data, samples) | api_facts, args.concurrency, rows)


async def _asked(
    args: argparse.Namespace, data: Dataset, samples: Sequence[Sample], address: str
) -> tuple[dict[str, Any], list[Row]]:
    # No proxy stands between this machine and itself.
    trust = args.url is not None
    async with connected(address, args.api_key, trust_env=trust) as api:
        rows = await compare(
            scorer(args, data, api),
            samples,
            args.calibration,
            args.concurrency,
            args.seed,
            progress,
        )
        versions = {"trimtab": api.versions["version"], "vllm": api.versions["vllm_version"]}
        return {"model": api.model, "versions": versions}, rows


def _facts(args: argparse.Namespace, data: Dataset, samples: Sequence[Sample]) -> dict[str, Any]:
    scoring = _scoring(args, data)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"file": data.name, "sha256": data.sha256},
        "samples": {
            "asked": len(samples),
            "split": args.split,
            "in the file": len(data.samples),
            "seed": args.seed,
        },
        "scoring": {"mode": scoring}
        | ({"max_tokens": args.max_tokens} if scoring == "generate" else {}),
        "server": "at --url" if args.url else " ".join(["started here", *args.serve_flags]),
        "python": platform.python_version(),
    }


def _make_room(folder: Path) -> None:
    if (folder / RESULTS).exists():
        raise Unusable(f"{folder / RESULTS} is there already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"--out {folder}: {error.strerror}") from None


def _write(results: Results, folder: Path) -> None:
    text = json.dumps(results.document(), indent=1, ensure_ascii=False) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    drawn = plots.draw(results.rows, folder) if plots.available() else []
    pictures = "".join(f"\n![{file.stem}]({file.name})\n" for file in drawn)
    (folder / REPORT).write_text(results.page() + pictures, encoding="utf-8")
    if not plots.available():
        progress(f"trimtab: {plots.MISSING}")
    progress(f"results in {folder}")
