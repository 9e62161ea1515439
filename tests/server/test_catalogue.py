import json
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field

from calibrators.act import ACT
from calibrators.settings import CalibrationSettings
from calibrators.var import VAR
from calibrators.zerotuning import ZeroTuning
from server import catalogue


class Settings(CalibrationSettings):
    method: Literal["sample"] = "sample"
    level: Annotated[int, Field(ge=1)]
    """How much
    of it."""
    spread: float = 0.25
    marks: list[int] = Field(default_factory=lambda: [1, 2])


@pytest.fixture
def sample(make_calibrator):
    return make_calibrator("sample", title="Sample", Settings=Settings)


def test_an_entry_is_json_and_describes_the_method():
    entry = catalogue.entry(ZeroTuning(), None)
    assert json.loads(json.dumps(entry)) == entry
    expected = {"id": "zerotuning", "object": "calibrator", "modality": "text", "causal": True}
    assert expected.items() <= entry.items()
    assert entry["paper"].startswith("https://arxiv.org/abs/")
    assert entry["defaults"] == {"gamma": None, "layers": "all", "heads": "all"}


def test_the_schema_carries_ranges_descriptions_and_strictness():
    schema = catalogue.entry(ZeroTuning(), None)["params_schema"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"method", "profile", "gamma", "layers", "heads"}
    gamma = schema["properties"]["gamma"]
    assert "0 < gamma <= 100" in gamma["description"]
    number = next(form for form in gamma["anyOf"] if form["type"] == "number")
    assert (number["exclusiveMinimum"], number["maximum"]) == (0, 100)


def test_defaults_are_resolved_for_the_model(make_facts, sample):
    act = ACT()
    usual = act.bind(act.Settings(), make_facts(layers=5))
    assert catalogue.entry(act, usual)["defaults"] == {
        "beta": 0.4,
        "alpha": 5.0,
        "threshold": None,
        "layers": [2, 3, 4],
        "heads": "all",
        "decode": "frozen",
    }
    assert catalogue.entry(act, None)["defaults"]["layers"] is None
    assert catalogue.entry(sample, None)["defaults"] == {"spread": 0.25, "marks": [1, 2]}


def test_defaults_leave_out_the_method_and_what_is_required(sample):
    assert catalogue.defaults(sample) == {"spread": 0.25, "marks": [1, 2]}


def test_the_table_has_a_line_for_each_parameter(sample):
    table = catalogue.table([ZeroTuning(), sample, ACT()])
    first, second, third = table.split("\n\n")
    assert first.startswith("zerotuning  ZeroTuning, text\n  paper: https://arxiv.org/abs/")
    lines = second.splitlines()
    assert lines[0] == "sample  Sample, text"
    rows = [line.split(maxsplit=2) for line in lines[2:]]
    assert [row[0] for row in rows] == ["level", "spread", "marks"]
    assert rows[0][1:] == ["required", "How much of it."]
    assert lines[3].split()[1:3] == ["default", "0.25"]
    threshold = next(line for line in third.splitlines() if line.startswith("  threshold"))
    assert threshold.split()[1:3] == ["Mean", "attention"]


def test_the_columns_of_a_calibrator_line_up():
    lines = catalogue.table([VAR()]).splitlines()[2:]
    starts = [re.match(r"  \w+ +(?=default)", line) for line in lines]
    columns = {start.end() for start in starts if start}
    assert len(columns) == 1
    assert sum(map(bool, starts)) > 3


def test_an_empty_table():
    assert catalogue.table([]) == ""
