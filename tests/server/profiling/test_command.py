import json
from collections import Counter

import pytest

from calibrators.profiles import load
from server import cli
from tests.server.profiling.fake_server import FakeServer

HEADS = {3: 0.3}
PAIRS = {(2, 1): 0.2, (3, 4): 0.1}


def left(out):
    """Files of a profile beside the data."""
    return sorted(path.name for path in out.parent.iterdir() if path.name != "data.jsonl")


def without_date(out):
    content = json.loads(out.read_text())
    del content["provenance"]["date"], content["name"]
    return content


def test_a_planted_head_is_found_reported_and_written(profile, capsys):
    status, out = profile(FakeServer(HEADS))
    found = load(out)

    assert status == 0
    assert found.parameters == {"gamma": 3.0, "heads": [3]}
    assert found.model.query_heads == 6
    provenance = found.provenance
    assert (provenance.split.search, provenance.split.report) == (20, 20)
    assert (provenance.baseline.value, provenance.result.value) == (0.5, 0.7)
    assert provenance.search["report"]["difference"]["gained"] == 4
    assert left(out) == ["found.json", "found.md", "found.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".md").read_text()
    assert "| head 3" in page and "![found.png](found.png)" in page
    printed = capsys.readouterr().out
    assert 'Chosen: {"gamma": 3.0, "heads": [3]}' in printed
    assert "No help was shown" in printed


def test_act_finds_planted_pairs(profile):
    status, out = profile(FakeServer(pairs=PAIRS), method="act")

    assert status == 0
    assert load(out).parameters == {"beta": 0.0, "heads": {"2": [1], "3": [4]}}


def test_without_answers_the_surest_is_taken(profile):
    status, out = profile(FakeServer({2: 0.5}), "--unsupervised")

    assert status == 0
    assert load(out).parameters == {"gamma": 3.5, "heads": [2]}
    assert {s["stage"] for s in load(out).provenance.search["stages"]} == {"probe", "sweep"}


def test_unsupervised_needs_no_answers(profile, data, capsys):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    asked = [{key: line[key] for key in ("prompt", "split")} for line in lines]
    data.write_text("".join(json.dumps(line) + "\n" for line in asked))
    server = FakeServer({2: 0.5})
    status, out = profile(server, "--unsupervised")
    provenance = load(out).provenance

    assert status == 0
    assert load(out).parameters == {"gamma": 3.5, "heads": [2]}
    assert provenance.metric.startswith("mean entropy")
    assert provenance.result.value < provenance.baseline.value
    assert all(json.loads(asked)[2] for asked in server.asked)
    assert "was not measured" in capsys.readouterr().out
    assert "entropy in nats (95 %)" in out.with_suffix(".md").read_text()


def test_supervised_needs_answers(profile, data, capsys):
    data.write_text('{"prompt": "x"}\n')
    refused(capsys, profile(FakeServer()), "data.jsonl:1: answer: Field required")


def test_answers_on_some_lines_alone(profile, data, capsys):
    data.write_text(data.read_text() + '{"prompt": "x", "split": "search"}\n')
    refused(capsys, profile(FakeServer(), "--unsupervised"), ":41: answers are given on some")


def test_search_and_report_samples_are_disjoint_and_limited(profile, data):
    server = FakeServer(HEADS)
    _, out = profile(server, "--samples", "10", "--report-samples", "5")
    split = {
        json.loads(x)["prompt"]: json.loads(x)["split"] for x in data.read_text().split("\n")[:-1]
    }
    by_split = Counter()
    for asked in server.asked:
        prompt, calibration, _ = json.loads(asked)
        by_split[split[prompt], calibration == "none"] += 1

    assert load(out).provenance.split.search == 10
    # Baseline and profile on the report samples; baseline, probes and gammas on the others.
    assert by_split["report", True] == by_split["report", False] == 5
    assert by_split["search", True] == 10
    assert set(server.asked.values()) == {1}


def test_a_profile_that_does_not_help_is_written_and_called_so(profile, capsys):
    # What is best by margins of the search samples changes no answer of the others.
    status, out = profile(FakeServer({3: 0.0, 4: -1e-3}, {}), "--unsupervised", "--grid", "0.9")

    assert status == 0
    assert load(out).provenance.result.value == load(out).provenance.baseline.value
    assert "The profile did not help" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 30, 150, 290])
def test_an_interrupted_search_goes_on_to_the_same_profile(profile, at, capsys):
    whole = FakeServer(HEADS)
    _, expected = profile(whole, "--concurrency", "3", name="whole")
    first, second = FakeServer(HEADS, interrupt_at=at), FakeServer(HEADS)

    status, out = profile(first, "--concurrency", "3")
    assert status == 2
    assert "trimtab: interrupted\n" in capsys.readouterr().err
    assert left(out) == [
        "found.json.partial.jsonl",
        "whole.json",
        "whole.md",
        "whole.png",
    ]

    status, out = profile(second, "--concurrency", "5")
    assert status == 0
    assert without_date(out) == without_date(expected)
    assert "found.json.partial.jsonl" not in left(out)
    # Only what was under way is asked twice.
    assert first.asked.total() + second.asked.total() - whole.asked.total() <= 3


def test_a_failing_server_costs_nothing_that_was_measured(profile, capsys):
    status, out = profile(FakeServer(HEADS, fail_at=50), "--concurrency", "1")

    assert status == 2
    error = capsys.readouterr().err
    assert "trimtab: probe, head 1, sample s18: status 500: out of memory\n" in error
    assert "found.json.partial.jsonl has what was measured" in error
    assert len((out.parent / "found.json.partial.jsonl").read_text().splitlines()) == 50


def test_a_state_of_other_settings_or_data_is_refused(profile, data, capsys):
    profile(FakeServer(HEADS, fail_at=50))
    state = data.parent / "found.json.partial.jsonl"
    before = state.read_bytes()

    assert profile(FakeServer(HEADS), "--seed", "1")[0] == 2
    assert "another seed: 0 there, 1 here" in capsys.readouterr().err
    assert profile(FakeServer(HEADS), "--probe-gamma", "3")[0] == 2
    assert "another probe: 2.0 there, 3.0 here" in capsys.readouterr().err
    data.write_text(data.read_text().replace("s39", "s40"))
    assert profile(FakeServer(HEADS))[0] == 2
    assert "another data" in capsys.readouterr().err
    assert state.read_bytes() == before


def test_a_state_that_was_named_is_kept(profile, tmp_path):
    status, out = profile(FakeServer(HEADS), "--state", str(tmp_path / "kept"))

    assert status == 0
    assert "kept" in left(out)


@pytest.mark.parametrize("name", ["tiny", "/models/tiny"])
def test_the_model_of_a_running_server_may_be_named(profile, name):
    assert profile(FakeServer(HEADS), "--model", name)[0] == 0


def refused(capsys, done, told):
    """One line that tells, status 2, no profile."""
    status, out = done
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("trimtab: ") and told in lines[0]
    assert not out.exists()


def test_another_model_than_was_named(profile, capsys):
    done = profile(FakeServer(), "--model", "huge")
    refused(capsys, done, "--model huge: the server at --url has tiny")


def test_a_server_without_the_method(profile, capsys):
    server = FakeServer()
    server.documents["/v1/calibrators"] = {"data": [{"id": "zerotuning"}]}
    refused(capsys, profile(server, method="act"), "does not offer act")


def test_a_server_that_does_not_know_its_model(profile, capsys):
    server = FakeServer()
    server.documents["/v1/calibration/profiles"] = {"data": [], "model": {"layers": 4}}
    refused(capsys, profile(server), "which architecture its model has")


def test_a_model_without_layers_for_act(profile, capsys):
    server = FakeServer()
    model = server.documents["/v1/calibration/profiles"]["model"] | {"layers": 2}
    server.documents["/v1/calibration/profiles"] = {"data": [], "model": model}
    refused(capsys, profile(server, method="act"), "layers 2 and above")


def test_a_bad_line_is_named_with_its_number(profile, data, capsys):
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:6], '{"prompt": "x"}', *lines[7:]]))
    refused(capsys, profile(FakeServer()), "data.jsonl:7: answer: Field required")


def test_an_empty_split(profile, data, capsys):
    data.write_text(data.read_text().replace('"report"', '"search"'))
    refused(capsys, profile(FakeServer()), "the split 'report' has no samples")


def test_a_profile_that_is_there_is_not_overwritten(profile, tmp_path, capsys):
    (tmp_path / "found.json").write_text("precious")
    status, out = profile(FakeServer())

    assert (status, out.read_text()) == (2, "precious")
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Found", "a b"])
def test_a_name_that_no_profile_may_have(profile, name, capsys):
    refused(capsys, profile(FakeServer(), name=name), "a profile's name has lower-case letters")


def test_flags_for_a_server_that_is_running(profile, capsys):
    done = profile(FakeServer(), "--", "--dtype", "float32")
    refused(capsys, done, "--dtype: the server at --url has its flags already")


def test_no_effect_is_told_and_what_was_measured_kept(profile, capsys):
    status, out = profile(FakeServer({}))

    assert status == 2
    assert "no probe changed any score" in capsys.readouterr().err
    assert left(out) == ["found.json.partial.jsonl"]


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("zerotuning", ["--probe-gamma", "1"]),
        ("zerotuning", ["--top", "0"]),
        ("zerotuning", ["--grid", "1,x"]),
        ("zerotuning", ["--grid", "0"]),
        ("act", ["--probe-beta", "1.5"]),
        ("act", ["--grid", "nan"]),
        ("act", ["--screen", "0"]),
        ("var", ["--sink-dims", "7,x"]),
        ("var", ["--tau", "0"]),
        ("var", ["--peak", "1"]),
        ("var", ["--probe-share", "0"]),
        ("gift", ["--grid", "11"]),
        ("gift", ["--probe-alpha", "0"]),
        ("vhr", []),
    ],
)
def test_flags_that_make_no_search(method, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["profile", method, "--data", "d", "--out", "o.json", *flags])
    assert caught.value.code == 2
    assert "usage: trimtab profile" in capsys.readouterr().err
