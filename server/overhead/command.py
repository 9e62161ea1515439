"""`trimtab bench`: what does each calibrator cost against plain requests?"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server import own_server
from server.evaluation.api import Api, ApiFailure, Calibration, connected, member
from server.evaluation.command import Unusable, check_calibrations, progress, served
from server.overhead import machine
from server.overhead.candidates import LeftOut, Offer
from server.overhead.prompts import Source, source
from server.overhead.report import NOTES, Results
from server.overhead.rounds import Load, Row, compare

HERE = frozenset({"127.0.0.1", "localhost", "::1"})
FAILURES = (Unusable, ApiFailure, httpx.TransportError, own_server.StartFailed)


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the figures.

    Returns:
        0; 1 where a calibration has no figures; 2 where nothing has any.
    """
    try:
        check_calibrations(args.calibration)
        _check_output(args.output)
        with served(args) as address:
            results = asyncio.run(_measured(args, address))
    except FAILURES as error:
        print(f"trimtab: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2
    print("\n".join(_told(results)))
    if args.output is not None:
        text = json.dumps(results.document(), indent=1, ensure_ascii=False) + "\n"
        args.output.write_text(text, encoding="utf-8")
    return 1 if any(row.error is not None for row in results.rows) else 0


def _check_output(file: Path | None) -> None:
    """Refuse a file that cannot be written before anything is measured."""
    if file is None:
        return
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise Unusable(f"--output {file}: {error.strerror}") from None


async def _measured(args: argparse.Namespace, address: str) -> Results:
    # No proxy stands between this machine and itself.
    async with connected(address, args.api_key, trust_env=args.url is not None) as api:
        api = await _serving(api, args)
        offer = await Offer.of(api)
        pictures = offer.pictures and not args.text_only
        usual, left_out = offer.usual(pictures=pictures)
        calibrations = args.calibration or usual
        prompts = await source(api, args.input_len, args.seed, pictures=pictures)
        facts = await _facts(args, api, address) | {"pictures": pictures}
        rows = await _compared(args, api, prompts, calibrations)
    facts["prompt_tokens"] = _lengths(rows[0])
    if args.calibration:
        return Results(facts, rows)
    # What nobody asked for by name is no error where its name alone does not do.
    refused = [LeftOut(_id(row.calibration), row.error or "") for row in rows if row.refused]
    return Results(facts, [row for row in rows if not row.refused], [*left_out, *refused])


async def _compared(
    args: argparse.Namespace, api: Api, prompts: Source, calibrations: Sequence[Calibration]
) -> list[Row]:
    requests = args.num_prompts or args.max_concurrency
    load = Load(requests, args.max_concurrency, args.output_len, args.rounds)
    return await compare(api, prompts, calibrations, load, progress)


def _id(calibration: Calibration) -> str:
    return str(calibration["method"] if isinstance(calibration, dict) else calibration)


async def _serving(api: Api, args: argparse.Namespace) -> Api:
    """The server, once it is known to have the model that is wanted."""
    if args.url is None or args.model is None:
        return api
    listed = member(await api.get("/v1/models"), "data")
    # Names that stand for a preset have a parent, and are known to routes that calibrate alone.
    names = [member(entry, "id") for entry in listed if entry.get("parent") is None]
    if args.model not in names:
        raise Unusable(f"--model {args.model}: the server at --url has {', '.join(names)}")
    return replace(api, model=args.model)


async def _facts(args: argparse.Namespace, api: Api, address: str) -> dict[str, Any]:
    at_home = httpx.URL(address).host in HERE
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": api.model,
        "versions": {"trimtab": api.versions["version"], "vllm": api.versions["vllm_version"]},
        "device": await _device(api),
        "server": "at --url" if args.url else " ".join(["started here", *args.serve_flags]),
        "machine" if at_home else "client_machine": machine.facts(),
        "seed": args.seed,
        "rounds": args.rounds,
        "max_concurrency": args.max_concurrency,
        "num_prompts": args.num_prompts or args.max_concurrency,
        "output_tokens": args.output_len,
    }


def _lengths(plain: Row) -> dict[str, int]:
    lengths = {timing.prompt_tokens for played in plain.rounds for timing in played.timings}
    return {"min": min(lengths), "max": max(lengths)}


async def _device(api: Api) -> str:
    """What the server computes on, as its metrics say."""
    response = await api.http.get("/metrics")
    # A server may keep its metrics elsewhere, or behind another key.
    text = response.text if response.status_code == HTTPStatus.OK else ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "trimtab_build_info":
                return str(sample.labels.get("device"))
    return "unknown"


def _told(results: Results) -> list[str]:
    """What is printed."""
    facts = results.facts
    where = "machine" if "machine" in facts else "client_machine"
    remarks = results.remarks()
    low, high = facts["prompt_tokens"]["min"], facts["prompt_tokens"]["max"]
    read = f"{low}" if low == high else f"{low} to {high}"
    picture = " with a picture" if facts["pictures"] else ""
    return [
        f"{facts['model']} on {facts['device']}, Trimtab {facts['versions']['trimtab']}, "
        f"vLLM {facts['versions']['vllm']}, server {facts['server']}, {facts['date']}",
        f"{where.replace('_', ' ')}: {machine.sentence(facts[where])}",
        f"{facts['rounds']} x {facts['num_prompts']} requests, "
        f"{facts['max_concurrency']} at a time, {read} prompt tokens{picture} and "
        f"{facts['output_tokens']} generated ones each, seed {facts['seed']}",
        "",
        results.table(),
        "",
        *(remarks and [*remarks, ""]),
        NOTES,
    ]
