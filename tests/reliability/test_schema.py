"""Requests made of the server's own OpenAPI document, those that fit and those that do not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PHASES = {True: "fuzzing", False: "coverage,fuzzing"}
logger = logging.getLogger(__name__)


@pytest.mark.slow
@pytest.mark.xdist_group("engine")
def test_no_request_of_the_schema_breaks_the_server(server, examples, tmp_path):
    report = tmp_path / "report.json"
    short = examples < 100
    command = [sys.executable, "-m", "schemathesis.cli"]
    command += ["--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    command += [f"{server.url}/openapi.json", "--max-examples", str(examples), "--no-shrink"]
    command += ["--phases", PHASES[short], "--report", "json", "--report-json-path", str(report)]
    if "CI" in os.environ:
        command += ["--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["operations"]["tested"] == found["operations"]["total"] > 20
    assert found["test_cases"]["with_failures"] == 0
    logger.info("%s, seed %s", found["test_cases"], found["seed"])
    with server.client() as client:
        assert client.get("/ready").status_code == 200


def environment():
    root = FOLDER.parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
