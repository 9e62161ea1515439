"""`trimtab profile`: which heads, layers and strength suit a model and data?"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from pydantic import ValidationError

from calibrators.profiles import ModelIdentity, save
from server import models, own_server
from server.evaluation import plots as figures
from server.evaluation.api import Api, ApiFailure, connected, member
from server.evaluation.command import Unusable, progress, scorer, served
from server.evaluation.samples import DataError, Sample, draw
from server.profiling import plots, report, var
from server.profiling.channels import Channels, NoSinks
from server.profiling.course import run
from server.profiling.entropies import Entropies
from server.profiling.method import Method
from server.profiling.outcome import Accuracies
from server.profiling.pairs import MeasurementFailed, Pairs, mean
from server.profiling.questions import Answers, Entropy, Question, Sinks
from server.profiling.result import Result
from server.profiling.search import (
    BASELINE,
    Candidate,
    Objective,
    Score,
    SearchFailed,
    Stage,
)
from server.profiling.state import StateError, opened
from server.profiling.task import Task

REPORT = "report"
FAILURES = (
    ApiFailure,
    DataError,
    MeasurementFailed,
    NoSinks,
    OSError,
    SearchFailed,
    StateError,
    Unusable,
    httpx.TransportError,
    models.ModelError,
    own_server.StartFailed,
)


def main(args: argparse.Namespace) -> int:
    """Search, report, write the profile, its page and its picture.

    Returns:
        0 once there is a profile, whether it helps or not; 2 where there is none.
    """
    task = None
    try:
        task = Task.of(args)
        channels = _channels(task)
        with served(args) as address:
            result, objective = asyncio.run(_found(task, channels, address))
        _write(result, objective, args.out)
    except FAILURES as error:
        return _given_up(str(error) or type(error).__name__, task)
    except KeyboardInterrupt:
        return _given_up("interrupted", task)
    if args.state is None:
        task.state.unlink(missing_ok=True)
    return 0


def _channels(task: Task) -> Channels | None:
    """Those that mark sinks, for VAR: looked for before a server takes the memory."""
    args = task.args
    if args.method != "var":
        return None
    if args.sink_dims is not None:
        tau = var.TAU if args.tau is None else args.tau
        return Channels(args.sink_dims, tau, ("sink_dims and tau were given, not looked for.",))
    from server.profiling.streams import channels

    samples = draw(task.search, args.observe_samples, args.seed)
    found = channels(args.model, samples, args.peak, args.tau, _bar)
    progress("\n".join(found.remarks))
    return found


def _given_up(reason: str, task: Task | None) -> int:
    print(f"trimtab: {reason}", file=sys.stderr)
    if task is not None and task.state.exists():
        progress(f"trimtab: {task.state} has what was measured; the same command goes on from it")
    return 2


async def _found(task: Task, channels: Channels | None, address: str) -> tuple[Result, Objective]:
    args = task.args
    # No proxy stands between this machine and itself.
    async with connected(address, args.api_key, trust_env=args.url is not None) as api:
        model = await _model(api, args)
        method = Method.of(args, model, channels)
        header = {
            "trimtab": api.versions["version"],
            "vllm": api.versions["vllm_version"],
            "data": task.data.sha256,
            "model": {"id": api.model, **model.model_dump()},
            "method": args.method,
            **task.settings,
            **method.settings,
        }
        with opened(task.state, header) as state:
            if len(state):
                progress(f"going on from {len(state)} measurements in {task.state}")
            pairs = Pairs(_questions(task, api), state, args.concurrency, _bar)
            result = await _searched(task, method, pairs, model, api)
        return result, method.objective


async def _model(api: Api, args: argparse.Namespace) -> ModelIdentity:
    """The model that is served, once it is known to be the one that is wanted."""
    entry = member(await api.get("/v1/models"), "data", 0)
    names = (entry.get("id"), entry.get("root"))
    if args.url is not None and args.model is not None and args.model not in names:
        raise Unusable(f"--model {args.model}: the server at --url has {api.model}")
    if args.method not in api.calibrators:
        raise Unusable(f"the server does not offer {args.method}")
    offered = await api.get(f"/v1/calibrators/{args.method}")
    if member(offered, "unavailable_reason") is not None:
        raise Unusable(offered["unavailable_reason"])
    document = await api.get("/v1/calibration/profiles")
    try:
        return ModelIdentity.model_validate(member(document, "model"))
    except ValidationError:
        raise ApiFailure("the server does not say which architecture its model has") from None


def _questions(task: Task, api: Api) -> dict[str, Question]:
    return {
        "answers": Answers(scorer(task.args, task.data, api)),
        "entropy": Entropy(api),
        "sinks": Sinks(api),
    }


async def _searched(
    task: Task, method: Method, pairs: Pairs, model: ModelIdentity, api: Api
) -> Result:
    async def score(stage: Stage) -> list[Score]:
        return [mean(v) for v in await pairs.measure(stage, _drawn(stage, task))]

    course = await run(method.search, score)
    chosen = Candidate("profile", {"method": task.args.method, **course.choice.parameters})
    labelled = task.data.labelled
    asked = Stage(REPORT, "answers" if labelled else "entropy", (BASELINE, chosen))
    before, after = await pairs.measure(asked, task.report)
    seed = task.args.seed
    return Result(
        name=task.args.out.stem,
        method=task.args.method,
        model=model,
        versions=api.versions,
        data=task.data,
        seed=seed,
        samples=(len(task.search), len(task.report)),
        settings={**task.settings, **method.settings},
        course=course,
        outcome=Accuracies.of(before, after, seed) if labelled else Entropies.of(before, after),
    )


def _drawn(stage: Stage, task: Task) -> Sequence[Sample]:
    return draw(task.search, stage.limit, task.args.seed)


@contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Callable[[], object]]:
    from tqdm import tqdm

    with tqdm(desc=name, total=total, initial=done, unit="pair", file=sys.stderr) as bar:
        yield bar.update


def _write(result: Result, objective: Objective, out: Path) -> None:
    print(f"{report.stage_table(result.course.stages[-1])}\n")
    print(f"{report.outcome_table(result)}\n\n{report.summary(result)}")
    save(result.profile(), out)
    pictures = []
    if figures.available():
        pictures.append(plots.draw(result.course, objective, out.with_suffix(".png")).name)
    else:
        progress(f"trimtab: {figures.MISSING}")
    page = out.with_suffix(".md")
    page.write_text(report.page(result, pictures), encoding="utf-8")
    progress(f"profile in {out}, report in {page}")
