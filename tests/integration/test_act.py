"""ACT over HTTP: against dense probabilities in float32, among others, and with a prefix cache."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.act_cases import SEEDS, SETTINGS
from tests.integration.oracle import ACT, Oracle, plain
from tests.integration.sequences import Text, log_probabilities
from tests.integration.serving import Server, serving

NEW_TOKENS = 12
TOLERANCE = 1e-3
# How near to its bound anything may come, relative to it; float32 disagrees by less than 1e-5.
MARGIN = 1e-4
STEP = 256
BLOCK = 32
ZERO = {"method": "zerotuning", "gamma": 0.3}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK)]
    flags += ["--max-num-batched-tokens", str(STEP), "--max-num-seqs", "12"]
    with serving(log, *flags, "--enable-prompt-tokens-details") as running:
        yield running


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def text(model: Path) -> Text:
    return Text(model)


def act(**setting: Any) -> dict[str, Any]:
    return {"method": "act", **setting}


def post(server: Server, path: str = "completions", **body: Any) -> Any:
    with server.client() as client:
        return client.post(f"/v1/{path}", json={"temperature": 0, **body})


def complete(server: Server, tokens: list[int], calibration: Any, **fields: Any) -> Any:
    body = {
        "prompt": tokens,
        "calibration": calibration,
        "max_tokens": NEW_TOKENS,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    response = post(server, **body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def together(server: Server, cases: list[tuple[list[int], Any]]) -> list[Any]:
    """All cases at once."""
    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(lambda case: complete(server, *case), cases))


def cached(answer: Any) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def applied(answer: Any) -> Any:
    (entry,) = answer["calibration"]["applied"]
    return entry


def deviation(oracle: Oracle, tokens: list[int], answer: Any, rewrite: Any) -> float:
    """How far log-probabilities of prompt and answer are from the oracle's."""
    sequence, measured = log_probabilities(answer, tokens)
    expected = oracle.log_probabilities(sequence, rewrite)
    return float((measured - expected).abs().max())


def check(oracle: Oracle, tokens: list[int], setting: dict[str, Any], answer: Any) -> float:
    """Log-probabilities and the receipt of an answer under ACT."""
    dense = ACT(oracle, setting, len(tokens))
    error = deviation(oracle, tokens, answer, dense)
    label = (setting, len(tokens), error, dense.margin, dense.left)
    assert dense.margin > MARGIN, label
    assert error < TOLERANCE, label
    # The last sampled token is never fed back.
    rows = dense.touched[: len(tokens) + NEW_TOKENS - 1]
    entry = applied(answer)
    counts = entry["prompt_tokens"], entry["completion_tokens"]
    assert counts == (int(rows[: len(tokens)].sum()), int(rows[len(tokens) :].sum())), label
    found = entry["statistics"]
    assert found["sinks"] == pytest.approx(dense.sinks / dense.pairs), label
    assert cached(answer) == 0
    return error


def test_all_settings_at_once_among_others_and_again(server, oracle, text, record_property):
    # Over three neighbouring settings every length occurs.
    picked = [
        (text.prompt(random.Random(seed), length), setting)
        for index, setting in enumerate(SETTINGS)
        for place, (length, seed) in enumerate(SEEDS[index].items())
        if (place + index) % 3 == 0
    ]
    cases: list[tuple[list[int], Any]] = [(tokens, act(**setting)) for tokens, setting in picked]
    others = [text.prompt(random.Random(5), length) for length in (40, 300)]
    cases += [(tokens, calibration) for tokens in others for calibration in (None, ZERO)]
    worst = 0.0
    for answers in (together(server, cases), together(server, cases[::-1])[::-1]):
        for (tokens, setting), answer in zip(picked, answers, strict=False):
            worst = max(worst, check(oracle, tokens, setting, answer))
        for (tokens, calibration), answer in list(zip(cases, answers, strict=True))[len(picked) :]:
            rewrite = oracle.zerotuning(ZERO) if calibration else plain
            assert deviation(oracle, tokens, answer, rewrite) < TOLERANCE
    record_property("deviation", worst)


@pytest.mark.long
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda index: str(SETTINGS[index]))
def test_every_setting_on_every_length_among_others_and_again(
    server, oracle, text, index, record_property
):
    setting = SETTINGS[index]
    prompts = [text.prompt(random.Random(seed), length) for length, seed in SEEDS[index].items()]
    others = [text.prompt(random.Random(index), length) for length in (40, 300)]
    cases = [(tokens, act(**setting)) for tokens in prompts]
    cases += [(tokens, calibration) for tokens in others for calibration in (None, ZERO)]
    worst = 0.0
    for answers in (together(server, cases), together(server, cases[::-1])[::-1]):
        for tokens, answer in zip(prompts, answers, strict=False):
            worst = max(worst, check(oracle, tokens, setting, answer))
    record_property("deviation", worst)
    neighbours = zip(cases, answers, strict=True)
    for (tokens, calibration), answer in list(neighbours)[len(prompts) :: 3]:
        rewrite = oracle.zerotuning(ZERO) if calibration else plain
        assert deviation(oracle, tokens, answer, rewrite) < TOLERANCE


def test_statistics_are_those_of_the_dense_equation(server, oracle, text):
    tokens = text.prompt(random.Random(SEEDS[0][64]), 64)
    # One token, never fed back: the rows are those of the prompt.
    answer = complete(server, tokens, act(), max_tokens=1)
    dense = ACT(oracle, {}, len(tokens))
    oracle.log_probabilities(tokens, dense)
    before = dense.before / dense.count
    assert applied(answer)["statistics"] == pytest.approx(
        {
            "sinks": dense.sinks / dense.pairs,
            "sink_mass_before": before,
            "sink_mass_after": 0.4 * before,
        },
        rel=1e-3,
    )
    assert dense.sinks > 0


@pytest.mark.parametrize("order", [(0, 1, 1, 0, 1), (1, 1, 0, 0, 1), (1, 0, 2, 1, 2)], ids=str)
def test_cached_blocks_are_shared_with_nobody(server, text, order):
    tokens = text.prompt(random.Random(3), 3 * BLOCK + 5)
    kinds = [None, act(), act(beta=0.1)]
    answers = [
        (kind, complete(server, tokens, kinds[kind], cache_salt=str(order), prompt_logprobs=None))
        for kind in order
    ]
    seen: set[int] = set()
    for kind, answer in answers:
        assert cached(answer) == (3 * BLOCK if kind == 0 and kind in seen else 0)
        seen.add(kind)
    for kind in seen:
        tokens_of = [answer["choices"][0]["token_ids"] for each, answer in answers if each == kind]
        assert tokens_of == [tokens_of[0]] * len(tokens_of)
    assert any(cached(answer) for _, answer in answers) == (order.count(0) > 1)


@pytest.mark.parametrize(
    ("length", "setting"), [(150, {"beta": 1}), (150, {"threshold": 0.999}), (1, {})], ids=str
)
def test_nothing_to_do_changes_no_bit(server, text, length, setting):
    tokens = text.prompt(random.Random(5), length)
    one = complete(server, tokens, None, cache_salt=str(setting))
    other = complete(server, tokens, act(**setting))
    for name in ("token_ids", "prompt_logprobs", "logprobs"):
        assert one["choices"][0][name] == other["choices"][0][name]
    entry = applied(other)
    assert entry["skipped"] is None
    if "beta" in setting:
        assert entry["prompt_tokens"] > 0
        masses = {entry["statistics"][f"sink_mass_{when}"] for when in ("before", "after")}
        assert len(masses) == 1
    else:
        assert (entry["prompt_tokens"], entry["completion_tokens"]) == (0, 0)
        assert entry["statistics"] == {"sinks": 0.0}


def test_copies_have_numbers_of_their_own(server, text):
    tokens = text.prompt(random.Random(6), 100)
    answer = complete(
        server, tokens, "act", n=2, temperature=1, seed=4, logprobs=None, prompt_logprobs=None
    )
    choices = applied(answer)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["prompt_tokens"] == choices[1]["prompt_tokens"] > 0
    assert choices[0]["statistics"]["sinks"] == pytest.approx(choices[1]["statistics"]["sinks"])


MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow, and say why. " * 4}]


def test_a_chat_carries_the_receipt_streamed_or_not(server):
    plain_answer = post(server, "chat/completions", messages=MESSAGES, max_tokens=12)
    body = {"messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}
    body["calibration"] = act(beta=0)
    whole = post(server, "chat/completions", **body)
    receipt = whole.json()["calibration"]
    assert whole.headers["X-Calibration"] == f"act;digest={receipt['digest']}"
    entry = applied(whole.json())
    assert entry["params"] == {
        "beta": 0.0,
        "alpha": 5.0,
        "threshold": None,
        "decode": "frozen",
        "layers": list(range(2, 30)),
        "heads": "all",
    }
    assert (entry["layers"], entry["heads"], entry["profile"]) == (28, 252, None)
    assert set(entry["statistics"]) == {"sinks", "sink_mass_before", "sink_mass_after"}
    assert entry["statistics"]["sink_mass_after"] == 0 < entry["statistics"]["sink_mass_before"]
    assert 0 < entry["prompt_tokens"] < whole.json()["usage"]["prompt_tokens"]
    content = [each.json()["choices"][0]["message"]["content"] for each in (plain_answer, whole)]
    assert content[0] != content[1]

    streamed = post(server, "chat/completions", stream=True, **body)
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert streamed.headers["X-Calibration"] == whole.headers["X-Calibration"]
    stamped = [chunk for chunk in chunks if "calibration" in chunk]
    assert [chunk["choices"][0]["finish_reason"] for chunk in stamped] == ["length"]
    assert stamped[0]["calibration"] == receipt
    words = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(words) == content[1]


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2, "temperature": 1}], ids=str)
def test_a_prompt_longer_than_a_step_is_refused(server, text, fields):
    long = {"prompt": text.tokens[: STEP + 1]}
    words = {"messages": [{"role": "user", "content": "word " * STEP}]}
    before = server.metric("vllm:prompt_tokens_total")
    for path, prompt in {"completions": long, "chat/completions": words}.items():
        answer = post(server, path, calibration="act", max_tokens=2, **prompt, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("calibration", "invalid_calibration")
        assert error["message"].startswith("ACT needs the whole prompt in one step")
        for said in (f"a step takes {STEP}:", "--max-num-batched-tokens"):
            assert said in error["message"]
    assert server.metric("vllm:prompt_tokens_total") == before
    assert server.metric("trimtab_active_requests", calibrator="act") == 0
    exactly = post(server, prompt=text.tokens[:STEP], calibration="act", max_tokens=2)
    assert exactly.status_code == 200


BAD = [
    ({"beta": -0.1}, "beta"),
    ({"beta": 1.01}, "beta"),
    ({"beta": None}, "beta"),
    ({"alpha": 0}, "alpha"),
    ({"alpha": True}, "alpha"),
    ({"threshold": 1}, "threshold"),
    ({"threshold": 0.1, "alpha": 5}, "threshold"),
    ({"decode": "on"}, "decode"),
    ({"gamma": 1}, "gamma"),
    ({"layers": [30]}, "layers"),
    ({"layers": []}, "layers"),
    ({"heads": [9]}, "heads"),
    ({"heads": {"1": [0]}}, "heads"),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bad_settings_are_refused_by_name(server, path):
    prompt = {"prompt": "Hi"} if path == "completions" else {"messages": MESSAGES}
    for setting, name in BAD:
        answer = post(server, path, calibration=act(**setting), **prompt)
        assert answer.status_code == 400, setting
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (f"calibration.{name}", "invalid_calibration")
    both = post(server, path, calibration=[act(), ZERO], **prompt)
    assert (both.status_code, both.json()["error"]["param"]) == (400, "calibration")


def test_the_listing_and_metrics_know_it(server):
    with server.client() as client:
        shown = client.get("/v1/calibrators/act").json()
    assert (shown["available"], shown["causal"], shown["modality"]) == (True, False, "text")
    assert shown["defaults"]["layers"] == list(range(2, 30))
    names = {"method", "beta", "alpha", "threshold", "layers", "heads", "decode", "profile"}
    assert set(shown["params_schema"]["properties"]) == names

    def counters() -> list[float]:
        return [
            server.metric("trimtab_requests_total", calibrator="act", outcome="applied"),
            server.metric("trimtab_calibrated_tokens_total", calibrator="act", phase="prompt"),
            server.metric("trimtab_sink_mass_ratio_count", calibrator="act", when="after"),
        ]

    before = counters()
    answer = post(server, prompt="Water boils at a temperature of " * 5, calibration="act")
    grown = [now - then for now, then in zip(counters(), before, strict=True)]
    assert grown == [1, applied(answer.json())["prompt_tokens"], 1]
    assert server.metric("trimtab_calibration_seconds_count", calibrator="act") > 0
