"""Discovery, probes, metrics, prefix cache and the doctor on a real server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import server as package
from server import cli
from server.metrics import FAMILIES

# Two whole pages of 128 keys, and a bit.
LONG = [5 + (i * i * 13 + i) % 40000 for i in range(300)]
SETTINGS = [None, {"method": "zerotuning", "gamma": 0.2}, {"method": "zerotuning", "gamma": 5}]


def complete(server, calibration, **fields):
    body = {
        "prompt": LONG,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 2,
        "calibration": calibration,
        **fields,
    }
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["logprobs"], cached, answer.get("calibration")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_calibrations_never_share_cached_blocks(server, order):
    salt = {"cache_salt": f"order-{order}"}
    first = {i: complete(server, SETTINGS[i], **salt) for i in order}
    again = {i: complete(server, SETTINGS[i], **salt) for i in order}
    assert [first[i][1] for i in order] == [0, 0, 0]
    assert [again[i][1] for i in order] == [256, 256, 256]
    tokens = [first[i][0]["tokens"] for i in (0, 1, 2)]
    assert tokens[0] != tokens[1] and tokens[0] != tokens[2] and tokens[1] != tokens[2]
    for i in order:
        assert again[i][0]["tokens"] == first[i][0]["tokens"]
        assert again[i][0]["token_logprobs"] == pytest.approx(
            first[i][0]["token_logprobs"], abs=0.05
        )


def test_positions_skipped_by_a_cache_hit_count_as_calibrated(server):
    for expected in (0, 256):
        _, cached, receipt = complete(server, SETTINGS[1], cache_salt="counting")
        assert cached == expected
        assert receipt["applied"][0]["prompt_tokens"] == len(LONG)
        assert receipt["applied"][0]["completion_tokens"] == 7


def test_spellings_of_one_setting_share(server):
    spelled = {
        "gamma": 0.2,
        "method": "zerotuning",
        "layers": list(reversed(range(30))),
        "heads": {str(layer): list(range(9)) for layer in range(30)},
    }
    _, _, one = complete(server, SETTINGS[1], cache_salt="spelling")
    _, cached, other = complete(server, spelled, cache_salt="spelling")
    assert cached == 256
    assert one["digest"] == other["digest"]


def test_discovery(server):
    with server.client() as client:
        listed = client.get("/v1/calibrators").json()
        single = client.get("/v1/calibrators/zerotuning").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["zerotuning", "act", "var", "gift", "vhr"]
    assert listed["data"][0] == single
    assert single["available"] is True
    assert single["unavailable_reason"] is None
    fields = {"method", "gamma", "layers", "heads", "profile"}
    assert set(single["params_schema"]["properties"]) == fields


def test_probes_and_versions(server):
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json() == {"status": "ready"}
        version = client.get("/version").json()
    assert version["version"] == package.__version__
    assert version["vllm_version"].startswith("0.3")


def test_metrics_count_what_receipts_say(server):
    labels = {"calibrator": "zerotuning"}

    def counters():
        return (
            server.metric("trimtab_requests_total", outcome="applied", **labels),
            server.metric("trimtab_calibrated_tokens_total", phase="prompt", **labels),
            server.metric("trimtab_calibrated_tokens_total", phase="completion", **labels),
            server.metric("trimtab_sink_mass_ratio_count", when="after", **labels),
        )

    before = counters()
    complete(server, SETTINGS[2])
    complete(server, None)
    grown = [b - a for a, b in zip(before, counters(), strict=True)]
    assert grown == [1, len(LONG), 7, 1]
    assert server.metric("trimtab_active_requests", **labels) == 0
    assert server.metric("trimtab_calibration_seconds_count", **labels) > 0


def test_all_families_are_exported(server):
    with server.client() as client:
        text = client.get("/metrics").text
    for family in FAMILIES:
        assert f"\n# TYPE {family.removesuffix('_total')}" in text
    assert "vllm:num_requests_running" in text


def test_the_doctor_finds_nothing_wrong(server):
    finished = subprocess.run(
        [sys.executable, "-m", "server.cli", "doctor", "--url", server.url],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "FAIL" not in finished.stdout


def test_what_every_calibrator_costs_is_measured(server, name, tmp_path, capsys):
    def applied():
        labels = {"outcome": "applied"}
        return [
            server.metric("trimtab_requests_total", calibrator=calibrator, **labels)
            for calibrator in ("zerotuning", "act")
        ]

    file, before = tmp_path / "out.json", applied()
    load = ["--rounds", "1", "--max-concurrency", "3", "--input-len", "40", "--output-len", "4"]
    assert cli.main(["bench", "--url", server.url, "--output", str(file), *load]) == 0

    document = json.loads(file.read_text(encoding="utf-8"))
    assert (document["model"], document["device"]) == (name, "cpu")
    assert document["prompt_tokens"] == {"min": 40, "max": 40}
    plain, *calibrated = document["rows"]
    methods = [row["calibration"] for row in calibrated]
    assert methods == [{"method": "zerotuning", "gamma": 0.5}, "act"]
    assert [each["calibrator"] for each in document["left_out"]] == ["var", "gift", "vhr"]
    # One round to warm up, and one that counts.
    assert [after - then for after, then in zip(applied(), before, strict=True)] == [6, 6]
    for row in document["rows"]:
        for request in row["rounds"][0]["requests"]:
            # Chunks came one by one, not all at the end.
            assert request["ttft_ms"] > 0 and request["tpot_ms"] > 0.1
    assert all(row["ttft_ms"]["to_plain"]["median"] > 0 for row in calibrated)
    assert plain["digest"] is None and all(row["digest"] for row in calibrated)
    assert "| plain " in capsys.readouterr().out
