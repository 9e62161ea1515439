"""Data, and the command against a fake server."""

import json

import pytest

from server import cli
from server.profiling import command


@pytest.fixture
def data(tmp_path):
    """Forty samples whose difficulties are spread evenly over either split."""
    lines = [
        {"prompt": f"{(i // 2 + 0.5) / 20}", "answer": "yes", "choices": ["yes", "no"]}
        | {"id": f"s{i}", "split": ("search", "report")[i % 2]}
        for i in range(40)
    ]
    # The same number in both splits would be one sample.
    for i in range(1, 40, 2):
        lines[i]["prompt"] += "1"
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def profile(tmp_path, data, monkeypatch):
    """Runs `trimtab profile` against a fake server; returns status and the profile's path."""

    def run(server, *flags, method="zerotuning", name="found", url=True):
        monkeypatch.setattr(command, "connected", server.connected)
        out = tmp_path / f"{name}.json"
        where = ["--url", "http://fake"] if url else []
        argv = ["profile", method, "--data", str(data), "--out", str(out), *where, *flags]
        return cli.main(argv), out

    return run
