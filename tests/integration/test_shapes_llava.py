"""The embedded vision model under its name, against transformers; methods change its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import examples.shapes_llava
from benchmarks import hallucination
from benchmarks.answers import Asker, Question, body_of
from calibrators.profiles import load
from examples.shapes_llava import samples
from examples.shapes_llava.ask import Model
from examples.shapes_llava.questions import DESCRIBE
from examples.shapes_llava.scenes import draw, scenes
from server import cli
from server.models import VISION_MODEL, prepare
from tests.integration.serving import Server, serving

PRESETS = Path(examples.shapes_llava.__file__).with_name("presets.toml")
VAR, GIFT, VHR = "shapes-var", {"method": "gift"}, {"method": "vhr"}
ASKED = (
    DESCRIBE,
    "Is there a yellow circle in the image?",
    "Can you see a red triangle?",
    "How many objects are there?",
    "What colour is the star?",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    flags += ["--calibration-presets", str(PRESETS)]
    with serving(tmp_path_factory.mktemp("shapes") / "log", VISION_MODEL, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    pictures = [draw(scene) for seed in (0, 1) for scene in scenes(seed, 4, broken=seed == 1)]
    return [Question(picture, text) for picture in pictures for text in ASKED]


def answers(server: Server, questions: list[Question], calibration: Any = None) -> list[str]:
    async def ask() -> list[str]:
        async with Asker(server.url, VISION_MODEL) as asker:
            return [answer.text.strip() for answer in await asker.ask(questions, calibration)]

    return asyncio.run(ask())


def test_greedy_answers_are_those_of_transformers(server, questions):
    model = Model(prepare(VISION_MODEL, report=lambda _: None))
    expected = model.answers([q.picture for q in questions], [q.text for q in questions])

    assert answers(server, questions) == expected
    assert len(set(expected)) > len(ASKED)


@pytest.mark.parametrize("wanted", [VAR, GIFT, VHR], ids=["var", "gift", "vhr"])
def test_methods_find_something_to_do(server, questions, wanted):
    with server.client() as client:
        body = body_of(questions[1], VISION_MODEL, wanted)
        (entry,) = client.post("/v1/chat/completions", json=body).json()["calibration"]["applied"]

    assert entry["skipped"] is None
    assert entry["prompt_tokens"] + entry["completion_tokens"] > 0


def test_the_benchmark_tells_methods_from_plain(server, tmp_path, capsys):
    file = tmp_path / "out.json"
    strong = {"method": "vhr", "alpha": 4.0}
    flags = ["--url", server.url, "--scenes", "6", "--json", str(file)]
    flags += [f"--calibration={json.dumps(each)}" for each in (VAR, strong)]

    assert hallucination.main(flags) == 0

    plain, var, vhr = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert plain["figures"]["usual.exact"]["value"] > 0.7
    assert plain["figures"]["random.valid"]["value"] == 1
    assert (var["skipped"], vhr["skipped"]) == (0, 0)
    assert any(change["value"] for change in vhr["differences"].values())
    assert "minus plain" in capsys.readouterr().out


def test_what_methods_cost_is_measured_on_pictures(server, tmp_path):
    file = tmp_path / "out.json"
    flags = ["--url", server.url, "--output", str(file), "--rounds", "1", "--max-concurrency", "2"]
    assert cli.main(["bench", *flags, "--input-len", "12", "--output-len", "3"]) == 0

    document = json.loads(file.read_text(encoding="utf-8"))
    named = [row["calibration"] for row in document["rows"]]
    assert named == [None, {"method": "zerotuning", "gamma": 0.5}, "act", "gift", "vhr"]
    ((left_out, reason),) = [each.values() for each in document["left_out"]]
    assert left_out == "var" and "sink_dims" in reason
    assert document["pictures"] and 64 < document["prompt_tokens"]["min"] < 110

    argv = ["bench", *flags, "--output-len", "1", "--input-len", "12", "--calibration", VAR]
    assert cli.main(argv) == 0


@pytest.mark.parametrize(
    ("method", "flags"),
    [("var", ["--sink-dims", "19,44", "--tau", "5", "--rhos", "0,0.9"]), ("gift", [])],
    ids=["var", "gift"],
)
def test_profiles_are_searched_for(server, questions, tmp_path, method, flags):
    data, out = tmp_path / "shapes.jsonl", tmp_path / "found.json"
    samples.main(["--scenes", "4", "--out", str(data)])
    argv = ["profile", method, "--data", str(data), "--out", str(out), "--url", server.url]

    assert cli.main([*argv, "--model", VISION_MODEL, "--grid", "0.4,1", *flags]) == 0

    found = load(out)
    assert (found.method, found.model.layers, found.model.query_heads) == (method, 8, 6)
    assert found.provenance.split.model_dump() == {"seed": 0, "search": 4, "report": 4}
    probed = found.provenance.search["stages"][0]["candidates"]
    assert len({scores["margin"] for scores in probed.values()}) > 1
    with server.client() as client:
        body = body_of(questions[1], VISION_MODEL, {"method": method, **found.parameters})
        (entry,) = client.post("/v1/chat/completions", json=body).json()["calibration"]["applied"]
    assert entry["params"] | found.parameters == entry["params"]
    assert entry["skipped"] is None
