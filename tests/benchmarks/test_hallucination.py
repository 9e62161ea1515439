import asyncio
import json

import httpx
import pytest

from benchmarks import hallucination
from benchmarks.answers import Asker
from benchmarks.examination import prepare
from benchmarks.hallucination import COLUMNS, described, label, main, report

CALIBRATION = {"method": "vhr", "alpha": 2.0}


@pytest.fixture
def server(monkeypatch):
    """A server that says yes, and no when calibrated; the list holds what it was asked."""
    bodies = []

    def handle(request):
        body = json.loads(request.content)
        bodies.append(body)
        calibrated = "calibration" in body
        receipt = {"calibration": {"applied": [{"skipped": None}]}} if calibrated else {}
        choices = [{"message": {"content": "No" if calibrated else "Yes"}}]
        return httpx.Response(200, json={"choices": choices, **receipt})

    def asker(url, model, api_key, parallel):
        return Asker(url, model, api_key, parallel, httpx.MockTransport(handle))

    monkeypatch.setattr(hallucination, "Asker", asker)
    return bodies


def test_plain_comes_first_and_calibrations_answer_the_same_questions(server, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--scenes", "3", "--json", str(file), "--calibration", json.dumps(CALIBRATION)]

    assert main(arguments) == 0

    half = len(server) // 2
    assert [body.get("calibration") for body in server] == [None] * half + [CALIBRATION] * half
    assert sorted(str(b["messages"]) for b in server[:half]) == sorted(
        str(b["messages"]) for b in server[half:]
    )
    plain, calibrated = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert plain["differences"] == {}
    assert plain["figures"]["random.yes"]["value"] == 1
    assert calibrated["figures"]["random.yes"]["value"] == 0
    assert calibrated["differences"]["random.yes"] == {"value": -1, "low": -1, "high": -1}
    assert "minus plain" in capsys.readouterr().out


def test_a_refusal_ends_the_run_with_the_servers_words(monkeypatch):
    def asker(url, model, api_key, parallel):
        refuse = httpx.MockTransport(lambda _: httpx.Response(400, text="no such method"))
        return Asker(url, model, api_key, parallel, refuse)

    monkeypatch.setattr(hallucination, "Asker", asker)

    with pytest.raises(SystemExit, match="no such method"):
        main(["--scenes", "1"])


def test_labels_are_plain_or_the_field():
    assert label(None) == "plain"
    assert label(CALIBRATION) == '{"method": "vhr", "alpha": 2.0}'


def test_tables_have_a_line_for_each_figure(server):
    arguments = hallucination._parser().parse_args([])
    results = asyncio.run(hallucination.run(arguments, prepare(2, 0), lambda _: None))

    assert [line.split("|")[1].strip() for line in report(results).splitlines()[2:]] == [*COLUMNS]
    assert set(COLUMNS) <= set(described(results)[0]["figures"])
