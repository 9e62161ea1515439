import hashlib
import json
import re
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from server import cli, own_server
from server.evaluation import api, command, plots
from tests.server.evaluation.fake import FakeServer

GAMMA = '{"method": "zerotuning", "gamma": 0.5}'
REFUSED = '{"method": "zerotuning", "gamma": 0}'
PNG = b"\x89PNG\r\n"


def helped(text, calibration):
    """Right on every third sample, and always with calibration."""
    number = int(re.search(r"\d+", text).group())
    return " yes" if calibration != "none" or number % 3 == 0 else " no"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [
        {
            "id": f"item-{number}",
            "prompt": f"Question {number}?",
            "answer": " yes",
            "labels": [" yes", " no"],
            "split": "report" if number < 12 else "search",
        }
        for number in range(16)
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def evaluate(monkeypatch, tmp_path, data, capsys):
    """Run the command against a fake; status, what was printed, the folder and the fake."""

    def run(*argv, prefers=helped, flaw=None, url="http://fake"):
        fake = FakeServer(prefers, flaw)

        @asynccontextmanager
        async def connected(address, api_key=None, *, trust_env=True):
            transport = httpx.MockTransport(fake)
            async with httpx.AsyncClient(transport=transport, base_url=address) as client:
                yield await api.acquainted(client)

        monkeypatch.setattr(command, "connected", connected)
        out = tmp_path / "out"
        where = ["--url", url] if url else []
        status = cli.main(["eval", "--data", str(data), "--out", str(out), *where, *argv])
        return status, capsys.readouterr(), out, fake

    return run


def test_rows_on_the_terminal(evaluate):
    status, printed, _, _ = evaluate("--calibration", GAMMA, "--calibration", "act")
    assert status == 0
    header, _, *rows = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")][1:3] == ["calibration", "accuracy (95 %)"]
    assert len({len(line) for line in rows}) == 1
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["baseline", GAMMA, "act"]
    assert cells[0][1:7] == ["33.3% (13.8% to 60.9%)", "100.0%", "33.3%", "", "", ""]
    assert cells[1][1] == "100.0% (75.8% to 100.0%)"
    assert cells[1][4].startswith("+66.7 (+41.7 to +91.7)")
    assert cells[1][5:7] == ["8, 0", "0.00781"]
    assert "act is significantly better than the baseline." in printed.out


def test_results_are_complete(evaluate, data):
    _, _, out, _ = evaluate("--calibration", GAMMA)
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert document["data"] == {"file": "data.jsonl", "sha256": digest}
    assert document["samples"] == {"asked": 12, "split": "report", "in the file": 16, "seed": 0}
    assert document["scoring"] == {"mode": "logprob"}
    assert document["versions"] == {"trimtab": "1.2", "vllm": "3.4"}
    assert document["model"] == "fake"
    assert re.match(r"\d{4}-\d\d-\d\dT", document["date"])
    baseline, calibrated = document["rows"]
    assert (baseline["calibration"], baseline["digests"]) == (None, [])
    assert calibrated["calibration"] == json.loads(GAMMA)
    assert calibrated["digests"] == ["0123456789ab"]
    assert calibrated["difference"]["gained"] == 8
    assert baseline["accuracy"]["count"] == 4
    outcome = calibrated["outcomes"][1]
    assert outcome["id"] == "item-1"
    assert outcome["choice"] == outcome["answer"] == " yes"
    assert outcome["correct"]
    assert outcome["logprobs"] == {" yes": -1.0, " no": -2.0}
    (receipt,) = outcome["receipts"]
    assert receipt == {"digest": "0123456789ab", "tokens": 5, "skipped": [], "statistics": {}}
    assert outcome["seconds"] > 0


def test_the_report_shows_table_and_plots(evaluate):
    _, _, out, _ = evaluate("--calibration", GAMMA)
    page = (out / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# Evaluation\n")
    assert "is significantly better than the baseline." in page
    for picture in ("accuracy.png", "changes.png"):
        assert f"({picture})" in page
        assert (out / picture).read_bytes().startswith(PNG)


def test_the_baseline_alone_is_a_result(evaluate):
    status, printed, out, _ = evaluate()
    assert status == 0
    assert "Nothing was compared" in printed.out
    assert not (out / "changes.png").exists()


def test_without_matplotlib_the_rest_is_written(evaluate, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    status, printed, out, _ = evaluate("--calibration", "act")
    assert status == 0
    assert "matplotlib is not installed" in printed.err
    assert "trimtab[eval]" in printed.err
    assert sorted(file.name for file in out.iterdir()) == ["report.md", "results.json"]


def test_a_refused_calibration_is_a_row_and_status_1(evaluate):
    status, printed, out, _ = evaluate("--calibration", REFUSED, "--calibration", "act")
    assert status == 1
    assert re.search(r"^\| \{.*0\} +\| error ", printed.out, re.MULTILINE)
    assert f"{REFUSED}: error: sample item-0: status 400: calibration.gamma" in printed.out
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    assert "gamma must be above 0" in rows[1]["error"]
    assert rows[2]["difference"]["gained"] == 8
    assert (out / "changes.png").exists()


def test_when_nothing_has_a_result_that_is_written_too(evaluate):
    status, _, out, _ = evaluate(flaw="never plain")
    assert status == 1
    assert sorted(file.name for file in out.iterdir()) == ["report.md", "results.json"]


def test_nothing_better_is_said_plainly(evaluate):
    _, printed, _, _ = evaluate("--calibration", "act", prefers=" no")
    assert "No calibration is significantly better than the baseline at 5 %." in printed.out


def test_samples_that_a_method_left_alone_are_counted(evaluate):
    _, printed, _, _ = evaluate("--calibration", "act", flaw="skips")
    assert "act: 12 samples were left alone by a method" in printed.out


def test_flags_choose_samples_and_scoring(evaluate):
    flags = ["--scoring", "generate", "--max-tokens", "3", "--split", "all", "--limit", "5"]
    _, _, out, fake = evaluate(*flags, "--seed", "4")
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert document["samples"]["asked"] == len(document["rows"][0]["outcomes"]) == 5
    assert document["scoring"] == {"mode": "generate", "max_tokens": 3}
    assert all(body["max_tokens"] == 3 for _, body in fake.requests)
    assert all("logprob_token_ids" not in body for _, body in fake.requests)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calibration", '"none"'], "the baseline is always there"),
        (["--calibration", "null"], "the baseline is always there"),
        (["--calibration", "act", "--calibration", '"act"'], "act: given twice"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--", "--dtype", "float32"], "--dtype: the server at --url has its flags already"),
        (["--out", "/proc/nothing"], "--out /proc/nothing: "),
    ],
)
def test_what_makes_no_evaluation_is_one_line_and_status_2(evaluate, argv, message):
    status, printed, out, fake = evaluate(*argv)
    assert (status, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("trimtab: ")
    assert message in printed.err
    assert not (out / "results.json").exists()
    assert fake.requests == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calibration", "{"], "--calibration: not JSON: '{'"),
        (["--limit", "0"], "--limit: not a positive whole number"),
        (["--seed", "-1"], "--seed: "),
        (["--scoring", "best"], "--scoring: invalid choice"),
        (["--model", "m"], "--model: not allowed with argument --url"),
        (["--calibrations", "act"], "--calibrations"),
    ],
)
def test_what_is_no_flag_or_value_is_status_2(evaluate, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        evaluate(*argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_earlier_results_are_kept(evaluate):
    evaluate()
    status, printed, out, _ = evaluate()
    assert status == 2
    assert f"{out / 'results.json'} is there already" in printed.err


@pytest.fixture
def own(monkeypatch):
    """What a server that the command starts is asked to be."""
    started = []

    @contextmanager
    def running(report, **options):
        started.append(options)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(own_server, "running", running)
    return started


def test_without_an_address_a_server_is_started(evaluate, own):
    status, _, out, _ = evaluate("--model", "some", "--", "--dtype", "float32", url=None)
    assert status == 0
    assert own == [{"api_key": None, "model": "some", "flags": ["--dtype", "float32"]}]
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert document["server"] == "started here --dtype float32"


def test_a_stray_argument_is_no_flag_of_a_server(evaluate, own):
    status, printed, _, _ = evaluate("some-model", url=None)
    assert (status, own) == (2, [])
    assert "some-model: is no flag of trimtab serve" in printed.err


def test_a_server_that_does_not_start_is_status_2(evaluate, monkeypatch):
    @contextmanager
    def running(report, **options):
        raise own_server.StartFailed("the server ended at start-up\nlast line")
        yield

    monkeypatch.setattr(own_server, "running", running)
    status, printed, _, _ = evaluate(url=None)
    assert status == 2
    assert printed.err == "trimtab: the server ended at start-up\nlast line\n"


def test_no_server_is_one_line_and_status_2(data, tmp_path, capsys, monkeypatch):
    for variable in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    argv = ["eval", "--data", str(data), "--out", str(tmp_path / "out"), "--url"]
    assert cli.main([*argv, "http://127.0.0.1:1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimtab: no server answers at http://127.0.0.1:1")
