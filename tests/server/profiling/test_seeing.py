"""`trimtab profile` for methods that look at images, against a fake server."""

import json
from dataclasses import replace

import pytest

from calibrators import registry
from calibrators.profiles import load
from server.admission import Admission
from server.profiling import streams
from server.profiling.channels import Channels, NoSinks
from tests.server.profiling.fake_server import IDENTITY, FakeServer

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.fixture
def data(tmp_path):
    """Twenty questions with images to search on, and as many to report on."""
    lines = [
        {
            "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": text}]}],
            "answer": "yes",
            "choices": ["yes", "no"],
            "split": split,
        }
        for split in ("search", "report")
        for text in (f"{(i + 0.5) / 20}{'1' * (split == 'report')}" for i in range(20))
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def looked(monkeypatch):
    """Has the model's channels told without a model; returns what was asked for."""
    asked = []

    def channels(name, samples, peak, tau, bar):
        asked.append((name, len(samples), peak, tau))
        if name == "without":
            raise NoSinks("no channel has tokens that stand out")
        return Channels((7, 50), 12.5, ("Seen in the model.",))

    monkeypatch.setattr(streams, "channels", channels)
    return asked


def most(value, best):
    """An effect that is largest at the best value."""
    return 0.3 - 0.3 * abs(value - best) / best


def refused(capsys, done, told):
    status, out = done
    assert status == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_gift_finds_layer_and_strength(profile):
    server = FakeServer(sight=lambda c: most(c["alpha"], 3) * (c["saliency_layer"] == 2))
    status, out = profile(server, method="gift")

    assert status == 0
    assert load(out).parameters == {"saliency_layer": 2, "alpha": 3.0}
    assert (load(out).provenance.baseline.value, load(out).provenance.result.value) == (0.5, 0.8)


def test_var_looks_into_the_model_first(profile, looked, capsys):
    server = FakeServer(sight=lambda c: most(c["share"], 0.8) * (c["rho"] == 0.5))
    status, out = profile(server, "--model", "/models/tiny", "--observe-samples", "3", method="var")
    found = load(out)

    assert status == 0
    assert looked == [("/models/tiny", 3, 10.0, None)]
    assert found.parameters == {"sink_dims": [7, 50], "tau": 12.5, "rho": 0.5, "share": 0.8}
    assert found.provenance.search["remarks"] == ["Seen in the model."]
    assert "Seen in the model." in capsys.readouterr().err


def test_channels_that_are_known_need_no_look(profile, looked):
    server = FakeServer(sight=lambda c: 0.1)
    _, usual = profile(server, "--sink-dims", "50,7", method="var", name="usual")
    _, given = profile(server, "--sink-dims", "7", "--tau", "5", method="var", name="given")

    assert looked == []
    assert load(usual).parameters["sink_dims"] == [7, 50]
    assert load(usual).parameters["tau"] == 20.0
    assert load(given).parameters["tau"] == 5.0
    assert load(given).provenance.search["remarks"][0].startswith("sink_dims and tau were given")


def test_channels_that_change_no_score_are_written_all_the_same(profile):
    server = FakeServer(sight=lambda c: 0.0)
    status, out = profile(server, "--sink-dims", "7", method="var")

    assert status == 0
    assert load(out).parameters == {"sink_dims": [7], "tau": 20.0}
    assert load(out).provenance.search["report"]["verdict"].startswith("The profile did not help")


@pytest.mark.parametrize(
    ("method", "flags"), [("var", ["--sink-dims", "7,50"]), ("gift", [])], ids=["var", "gift"]
)
def test_a_request_can_name_the_profile(profile, make_facts, method, flags):
    _, out = profile(FakeServer(sight=lambda c: 0.1), *flags, method=method)
    found = load(out)
    facts = replace(make_facts(modality="vision"), **IDENTITY)
    admission = Admission(registry.load(), facts, "model", profiles={found.name: found})

    (bound,) = admission.admit({"method": method, "profile": "found"}).bounds

    assert bound.profile == "found"
    assert bound.params | dict(found.parameters) == bound.params


def test_a_search_with_other_channels_does_not_go_on(profile, capsys):
    failing = FakeServer(sight=lambda c: 0.1, fail_at=30)
    assert profile(failing, "--sink-dims", "7", method="var")[0] == 2
    assert profile(FakeServer(sight=lambda c: 0.1), "--sink-dims", "8", method="var")[0] == 2
    assert "another sink_dims: [7] there, [8] here" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["var", "gift"])
def test_a_sample_without_an_image_is_named_with_its_line(profile, data, capsys, method):
    lines = data.read_text().splitlines()
    text = {"messages": [{"role": "user", "content": "0.5"}], "answer": "a", "choices": ["a", "b"]}
    lines[4] = json.dumps(text | {"split": "search"})
    data.write_text("\n".join(lines))

    done = profile(FakeServer(), "--model", "tiny", method=method)

    refused(capsys, done, "data.jsonl:5: no message has a part with an image_url")


def test_a_model_of_text_alone(profile, capsys):
    server = FakeServer()
    reason = "GIFT needs a model that takes images; this one takes text only"
    server.documents["/v1/calibrators/gift"] = {"id": "gift", "unavailable_reason": reason}

    refused(capsys, profile(server, method="gift"), f"trimtab: {reason}\n")


def test_a_model_without_sinks(profile, looked, capsys):
    refused(
        capsys, profile(FakeServer(), "--model", "without", method="var"), "trimtab: no channel"
    )
    assert looked


@pytest.mark.parametrize("method", ["var", "gift"])
def test_the_default_model_has_no_eyes(profile, capsys, method):
    done = profile(FakeServer(), method=method, url=False)
    refused(capsys, done, f"--model is needed: {method} is for models that take images")


def test_a_running_server_does_not_tell_its_streams(profile, capsys):
    done = profile(FakeServer(), method="var")
    refused(capsys, done, "--model is needed, to look for its sinks; --sink-dims does without")
