import json
import re
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from server import cli, own_server
from server.evaluation import api
from server.overhead import command
from tests.server.overhead.fake import PICTURE_TOKENS, TEXT_ONLY, method

QUICK = ("--rounds", "2", "--max-concurrency", "2", "--input-len", "6", "--output-len", "3")
GAMMA = '{"method": "zerotuning", "gamma": 0.5}'


@pytest.fixture
def bench(monkeypatch, capsys, make_server):
    """Run the command against a fake; status, what was printed, and the fake."""

    def run(*argv, url="http://fake", **options):
        fake = make_server(**options)

        @asynccontextmanager
        async def connected(address, api_key=None, *, trust_env=True):
            transport = httpx.MockTransport(fake)
            async with httpx.AsyncClient(transport=transport, base_url=address) as client:
                yield await api.acquainted(client)

        monkeypatch.setattr(command, "connected", connected)
        where = ["--url", url] if url else []
        status = cli.main(["bench", *where, *QUICK, *argv])
        return status, capsys.readouterr(), fake

    return run


def rows_of(printed):
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return header, rows


def test_every_calibrator_of_a_text_model_is_measured(bench):
    status, printed, _ = bench(slower={"act": 2.0})
    header, rows = rows_of(printed)
    assert status == 0
    assert header == [
        "calibration",
        *("TTFT ms", "to plain", "TPOT ms", "to plain", "output tokens/s", "to plain"),
    ]
    assert [row[0] for row in rows] == ["plain", GAMMA, "act"]
    assert rows[0][2] == rows[0][4] == rows[0][6] == ""
    # Two at a time share the fake's one clock; ratios are as they were made.
    assert rows[2][2] == "2.00 (2.00..2.00)"
    assert rows[2][6] == "0.50 (0.50..0.50)"
    for name in ("var", "vhr"):
        assert f"\nleft out: {name}: {TEXT_ONLY}\n" in printed.out


def test_what_was_measured_is_said(bench):
    _, printed, _ = bench("--seed", "7")
    first, second, third, *_ = printed.out.splitlines()
    assert first.startswith("fake on cpu, Trimtab 1.2, vLLM 3.4, server at --url, 20")
    assert second.startswith("client machine: processor ")
    assert third == (
        "2 x 2 requests, 2 at a time, 6 prompt tokens and 3 generated ones each, seed 7"
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1/"])
def test_a_server_on_this_machine_has_its_facts(bench, url):
    _, printed, _ = bench(url=url)
    assert printed.out.splitlines()[1].startswith("machine: ")


def test_all_figures_are_written(bench, tmp_path):
    file = tmp_path / "out.json"
    status, _, _ = bench("--output", str(file), "--calibration", "act", slower={"act": 3.0})
    document = json.loads(file.read_text(encoding="utf-8"))
    assert status == 0
    assert document["versions"] == {"trimtab": "1.2", "vllm": "3.4"}
    assert (document["model"], document["device"], document["seed"]) == ("fake", "cpu", 0)
    assert document["client_machine"]["cores"] > 0
    assert document["prompt_tokens"] == {"min": 6, "max": 6}
    assert (document["output_tokens"], document["num_prompts"]) == (3, 2)
    plain, act = document["rows"]
    assert (plain["calibration"], act["calibration"]) == (None, "act")
    assert (plain["digest"], act["digest"]) == (None, "0123456789ab")
    assert plain["ttft_ms"]["to_plain"] is None
    assert act["ttft_ms"]["to_plain"] == pytest.approx({"median": 3, "min": 3, "max": 3})
    assert act["output_tokens_per_s"]["to_plain"]["median"] == pytest.approx(1 / 3)
    assert [len(played["requests"]) for played in act["rounds"]] == [2, 2]
    assert act["rounds"][0]["requests"][0]["output_tokens"] == 3
    assert document["left_out"] == []


def test_one_generated_token_has_no_time_between_tokens(bench, tmp_path):
    file = tmp_path / "out.json"
    _, printed, _ = bench("--output-len", "1", "--output", str(file))
    _, rows = rows_of(printed)
    assert all(row[3] == row[4] == "" for row in rows)
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["rows"][1]["tpot_ms"] == {"value": None, "to_plain": None}


def test_a_model_that_takes_pictures_gets_some(bench, tmp_path):
    file = tmp_path / "out.json"
    status, printed, fake = bench("--output", str(file), vision=True)
    _, rows = rows_of(printed)
    assert status == 0
    assert [row[0] for row in rows] == ["plain", GAMMA, "act", "vhr"]
    assert {path for path, _ in fake.requests} == {"/v1/chat/completions"}
    # VAR has no channels for this model: refused, so left out and not an error.
    assert "left out: var: status 400: calibration: more is needed" in printed.out
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["left_out"][0]["calibrator"] == "var"
    assert document["pictures"] is True
    assert document["prompt_tokens"]["min"] == PICTURE_TOKENS + 3
    assert "prompt tokens with a picture and" in printed.out


def test_pictures_can_be_left_out(bench):
    status, printed, fake = bench("--text-only", vision=True)
    assert status == 0
    assert {path for path, _ in fake.requests} == {"/v1/completions"}
    assert "left out: vhr: needs pictures" in printed.out


def test_only_what_is_named_is_measured(bench):
    var = '{"method": "var", "tau": 5}'
    status, printed, _ = bench("--calibration", var, "--calibration", "act")
    assert status == 0
    assert [row[0] for row in rows_of(printed)[1]] == ["plain", var, "act"]
    assert "left out" not in printed.out


@pytest.mark.parametrize("flaw", ["refused", "no receipt", "skips"])
def test_what_is_named_and_fails_is_an_error_and_status_1(bench, flaw):
    status, printed, _ = bench("--calibration", "act", flaws={"act": flaw})
    assert status == 1
    assert [row[:3] for row in rows_of(printed)[1]][1] == ["act", "error", ""]
    assert re.search(r"^act: error: ", printed.out, re.MULTILINE)


def test_an_answer_that_is_not_calibrated_is_an_error_by_default_too(bench):
    status, printed, _ = bench(flaws={"act": "no receipt"})
    assert status == 1
    assert "act: error: a calibrated request came back without a receipt" in printed.out


def test_a_server_that_shows_no_metrics_has_an_unknown_device(bench):
    status, printed, _ = bench("--calibration", "act", flaws={"metrics": True})
    assert status == 0
    assert printed.out.startswith("fake on unknown, ")


def test_requests_in_a_round_and_at_a_time_are_two_things(bench):
    _, printed, fake = bench("--num-prompts", "5", "--calibration", "act")
    assert len(fake.requests) == 5 * 3 * 2
    assert " x 5 requests, 2 at a time" in printed.out


def test_the_model_may_be_named(bench):
    status, _, fake = bench("--model", "fake", "--calibration", "act")
    assert status == 0
    assert {body["model"] for _, body in fake.requests} == {"fake"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calibration", '"none"'], "the baseline is always there"),
        (["--calibration", "act", "--calibration", '"act"'], "act: given twice"),
        (["--model", "other"], "--model other: the server at --url has fake"),
        (["--model", "fake:preset"], "--model fake:preset: the server at --url has fake"),
        (["--", "--dtype", "float32"], "--dtype: the server at --url has its flags already"),
        (["--output", "/proc/nothing"], "--output /proc/nothing: "),
    ],
)
def test_what_makes_no_comparison_is_one_line_and_status_2(bench, argv, message):
    status, printed, fake = bench(*argv)
    assert (status, printed.out, fake.requests) == (2, "", [])
    (line,) = printed.err.splitlines()
    assert line.startswith("trimtab: ")
    assert message in line


def test_plain_requests_that_fail_are_status_2(bench):
    status, printed, _ = bench(flaws={"none": "breaks"})
    assert (status, printed.out) == (2, "")
    assert printed.err.splitlines()[-1] == "trimtab: the request failed: ReadError"


@pytest.mark.parametrize("flag", ["--rounds", "--max-concurrency", "--input-len", "--output-len"])
def test_numbers_are_positive(bench, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        bench(flag, "0")
    assert caught.value.code == 2
    assert f"{flag}: not a positive whole number" in capsys.readouterr().err


def test_without_an_address_a_server_is_started(bench, monkeypatch):
    started = []

    @contextmanager
    def running(report, **options):
        started.append(options)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(own_server, "running", running)
    argv = ["--api-key", "k", "--model", "some", "--", "--dtype", "float32"]
    status, printed, fake = bench(*argv, url=None)
    assert status == 0
    assert started == [{"api_key": "k", "model": "some", "flags": ["--dtype", "float32"]}]
    assert {body["model"] for _, body in fake.requests} == {"fake"}
    assert "server started here --dtype float32" in printed.out
    assert any(method(body["calibration"]) == "zerotuning" for _, body in fake.requests)
