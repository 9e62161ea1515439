"""VAR, GIFT and VHR over HTTP on a small LLaVA, against dense probabilities in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from calibrators import reference
from tests.fixtures import llava
from tests.integration import vision_cases as cases
from tests.integration.serving import Server, one_core_each, serving
from tests.integration.sighted import GIFT, VAR, VHR, DenseLlava, Found, Look, Seen
from tests.integration.vision_cases import (
    DARK,
    LONG,
    NEW_TOKENS,
    NO_CONTENT,
    SHORT,
    Conversation,
)

TOLERANCE = 1e-3
# How near to its bound anything may come, relative to it.
MARGIN = 2e-5
STEP = 112
BLOCK = 32
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "block_size": BLOCK,
    "max_num_batched_tokens": STEP,
    "max_num_seqs": 16,
    # 29 blocks of 80 KiB, one of them vLLM's own: four long conversations of 7 blocks, each of
    # which wants an eighth before its answer ends, so that some are preempted.
    "kv_cache_memory_bytes": 29 * 80 << 10,
}
ZERO = {"method": "zerotuning", "gamma": 0.3}
METHODS = {"var": cases.VAR, "gift": cases.GIFT, "vhr": cases.VHR}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava.build(tmp_path_factory.mktemp("llava") / "model")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.fixture(scope="module", params=[1], ids=["one rank"])
def server(request: Any, folder: Path) -> Iterator[Server]:
    engine = [part for name, value in ENGINE.items() for part in (_flag(name), str(value))]
    flags = ["--served-model-name", "llava", "--enable-prompt-tokens-details"]
    flags += ["--tensor-parallel-size", str(request.param)]
    env = one_core_each(request.param) if request.param > 1 else {}
    with serving(folder.parent / "log", str(folder), *engine, *flags, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def dense(folder: Path) -> DenseLlava:
    return DenseLlava(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def calibration(method: str, setting: dict[str, Any]) -> dict[str, Any]:
    channels = {"sink_dims": list(llava.SINK_CHANNELS)} if method == "var" else {}
    return {"method": method, **channels, **setting}


def post(server: Server, conversation: Conversation | None = None, **fields: Any) -> Any:
    body = {
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        # A random model might write one, which a dense forward would take for a part of an image.
        # Log-probabilities are those before the bias.
        "logit_bias": {str(llava.IMAGE_ID): -100},
    }
    if conversation is not None:
        body["messages"] = conversation.messages
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body | fields)


def ask(server: Server, conversation: Conversation, wanted: Any, **fields: Any) -> Any:
    response = post(server, conversation, calibration=wanted, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def together(server: Server, wanted: list[tuple[Conversation, Any]]) -> list[Any]:
    """All at once."""
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda case: ask(server, *case), wanted))


def cached(answer: Any) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def entries(answer: Any) -> list[Any]:
    applied: list[Any] = answer["calibration"]["applied"]
    return applied


@dataclass
class Measured:
    """An answer beside what a dense forward makes of the same tokens."""

    dense: DenseLlava
    processor: Any
    conversation: Conversation
    answer: Any

    @property
    def look(self) -> Look:
        prompt = self.answer["prompt_token_ids"]
        tokens = [*prompt, *self.answer["choices"][0]["token_ids"]]
        return self.conversation.look(self.processor.tokenizer, llava.IMAGE_ID, prompt, tokens)

    def forward(self, act: Any, images: bool = True, tokens: list[int] | None = None) -> Any:
        inputs = {}
        if images and self.conversation.images:
            pixels = self.processor.image_processor(self.conversation.images, return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"]
        return self.dense.log_probabilities(tokens or self.look.tokens, act, **inputs)

    def deviation(self, act: Any) -> float:
        """How far log-probabilities of prompt and answer are from those under `act`."""
        look = self.look
        given = [
            entry[str(token)]["logprob"]
            for token, entry in zip(
                look.tokens[1 : look.prompt], self.answer["prompt_logprobs"][1:], strict=True
            )
        ]
        made = [entry["logprob"] for entry in self.answer["choices"][0]["logprobs"]["content"]]
        return float((torch.tensor([*given, *made]) - self.forward(act)).abs().max())

    def method(self, name: str, setting: dict[str, Any]) -> tuple[Any, Found]:
        """The method on dense probabilities, ready to act."""
        look = self.look
        if name == "var":
            var = VAR(setting, look)
            return var, var.found
        if name == "gift":
            gift = GIFT(setting, look)
            self.forward(gift.saliency)
            return gift, gift.found
        vhr = VHR(setting, look)
        text = [t for t, i in zip(look.tokens, look.image.tolist(), strict=True) if not i]
        self.forward(vhr.text, False, text[: len(text) - len(look.tokens) + look.prompt])
        return vhr, vhr.found


def check(measured: Measured, name: str, setting: dict[str, Any], again: bool) -> float:
    """Log-probabilities and receipt of an answer under one method."""
    act, found = measured.method(name, setting)
    error = measured.deviation(act)
    look, (entry,) = measured.look, entries(measured.answer)
    label = (name, setting, error, found, entry)
    assert found.margin > MARGIN, label
    assert error < TOLERANCE, label
    if found.touched:
        rows = [row for row in found.touched if row < look.fed]
        expected = [sum(row < look.prompt for row in rows), sum(row >= look.prompt for row in rows)]
        counts = [entry["prompt_tokens"], entry["completion_tokens"]]
        # Rows that came out of the cache pass for calibrated where the method looks at them.
        assert counts == expected or (again and counts[0] >= expected[0]), label
        assert entry["skipped"] is None
    if not again:
        for statistic, value in found.statistics.items():
            assert entry["statistics"][statistic] == (
                value if isinstance(value, dict) else pytest.approx(value, rel=1e-3, abs=1e-6)
            ), label
    return error


def plain(seen: Seen, p: Any) -> Any:
    return p


def check_batch(
    server: Server, dense: DenseLlava, processor: Any, conversation: Conversation
) -> dict[str, float]:
    """Every setting in one batch with other requests, twice; the worst deviation by method."""
    wanted: list[tuple[str, dict[str, Any]]] = [
        (name, setting)
        for name, settings in METHODS.items()
        for setting in settings
        if conversation is SHORT or name != "vhr" or setting.get("rows") == "last"
    ]
    others = [(SHORT, None), (LONG, None), (SHORT, ZERO), (LONG, ZERO)]
    words = Conversation((((), "Name three terms of the licence."),))
    others += [(words, None), (words, ZERO)]
    batch = [(conversation, calibration(*each)) for each in wanted] + others
    worst = dict.fromkeys(METHODS, 0.0)
    for again, order in ((False, 1), (True, -1)):
        answers = together(server, batch[::order])[::order]
        for (name, setting), answer in zip(wanted, answers, strict=False):
            measured = Measured(dense, processor, conversation, answer)
            worst[name] = max(worst[name], check(measured, name, setting, again))
        for (asked, kind), answer in zip(others, answers[len(wanted) :], strict=True):
            measured = Measured(dense, processor, asked, answer)
            act = plain if kind is None else lambda seen, p: _zerotuning(p)
            assert measured.deviation(act) < TOLERANCE
    return worst


@pytest.mark.parametrize("conversation", [SHORT, LONG], ids=["short", "long"])
def test_every_setting_in_one_batch_with_others_and_again(
    server, dense, processor, conversation, record_testsuite_property
):
    worst = check_batch(server, dense, processor, conversation)
    for name, deviation in worst.items():
        record_testsuite_property(
            f"deviation of {name}, {len(conversation.images)} images", deviation
        )
    if conversation is LONG:
        assert server.metric("vllm:num_preemptions_total") > 0


@pytest.mark.parametrize("server", [2], ids=["two ranks"], indirect=True)
def test_two_ranks_agree_with_the_same_dense_forward(server, dense, processor):
    check_batch(server, dense, processor, SHORT)


def _zerotuning(p: Any) -> Any:
    return reference.zerotuning(p, torch.tensor(ZERO["gamma"]))


def test_chunks_cut_through_an_image(server, dense, processor):
    look = Measured(dense, processor, LONG, ask(server, LONG, None)).look
    assert look.image[STEP - 1] and look.image[STEP]


@pytest.mark.parametrize("rows", ["all", "last"])
def test_weights_are_calibrated_first_and_heads_scaled_last(server, dense, processor, rows):
    settings = {"var": {"share": 0.9}, "vhr": {"rows": rows, "alpha": 1.5}}
    # Asked for in the wrong order: the rules say which comes first.
    wanted = [calibration(name, settings[name]) for name in ("vhr", "var")]
    measured = Measured(dense, processor, SHORT, ask(server, SHORT, wanted))
    var, of_var = measured.method("var", settings["var"])
    vhr, of_vhr = measured.method("vhr", settings["vhr"])
    assert measured.deviation(lambda seen, p: vhr(seen, var(seen, p))) < TOLERANCE
    assert min(of_var.margin, of_vhr.margin) > MARGIN
    first, second = entries(measured.answer)
    assert (first["method"], second["method"]) == ("var", "vhr")
    heads = of_vhr.statistics["heads_selected"]
    assert second["statistics"]["heads_selected"] == heads
    assert second["heads"] == sum(map(len, heads.values()))


@pytest.mark.parametrize(
    ("conversation", "method", "setting", "reason"),
    [
        (DARK, "var", {}, "no image token is an attention sink in any selected layer (tau 20.0)"),
        (NO_CONTENT, "gift", {}, "the last user message has no content word"),
    ],
)
def test_a_method_with_nothing_to_do_says_so_and_changes_no_bit(
    server, conversation, method, setting, reason
):
    before = server.metric("trimtab_requests_total", calibrator=method, outcome="skipped")
    one = ask(server, conversation, None, cache_salt=method)
    for _ in range(2):
        other = ask(server, conversation, calibration(method, setting))
        (entry,) = entries(other)
        assert entry["skipped"].startswith(reason)
        assert (entry["prompt_tokens"], entry["completion_tokens"]) == (0, 0)
        assert other["choices"][0]["token_ids"] == one["choices"][0]["token_ids"]
    if method == "var":  # the same chunks; GIFT has the last token computed by itself
        first = ask(server, conversation, calibration(method, {**setting, "tau": 19.0}))
        assert first["prompt_logprobs"] == one["prompt_logprobs"]
        assert entry["statistics"]["visual_sinks"] == 0 < entry["statistics"]["text_sinks"]
    after = server.metric("trimtab_requests_total", calibrator=method, outcome="skipped")
    assert after - before == (3 if method == "var" else 2)


@pytest.mark.parametrize("method", ["var", "gift", "vhr"])
def test_without_an_image_a_vision_method_is_refused(server, method):
    wanted = calibration(method, {})
    text = {"messages": [{"role": "user", "content": "What is it?"}], "stream": True}
    for field, path in ((wanted, "calibration"), ([ZERO, wanted], "calibration[1]")):
        if isinstance(field, list) and method != "vhr":
            continue
        answer = post(server, calibration=field, prompt_logprobs=None, **text)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, path)
        assert error["code"] == "invalid_calibration"
        assert "needs an image" in error["message"]
    with server.client() as client:
        body = {"prompt": "<image> What is it?", "calibration": wanted}
        answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_calibration")
    assert server.metric("trimtab_active_requests", calibrator=method) == 0


def test_var_is_refused_where_nobody_names_the_channels_of_sinks(server):
    answer = post(server, SHORT, calibration="var")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_calibration")
    assert error["param"] == "calibration.sink_dims"
    assert "`trimtab profile var`" in error["message"]


@pytest.mark.parametrize("wanted", [None, "gift"])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:9/a.png", "--allowed-media-domains"),
        ("file:///etc/hostname", "--allowed-local-media-path"),
        ("data:image/png;base64,AAAA", "none of the formats"),
    ],
)
def test_other_images_are_refused_before_the_engine(server, wanted, url, why):
    before = server.metric("vllm:prompt_tokens_total")
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Hm?"}]}]
    answer = post(server, messages=messages, calibration=wanted)
    assert answer.status_code == 400, answer.text
    assert why in answer.json()["error"]["message"]
    assert server.metric("vllm:prompt_tokens_total") == before


def test_more_images_than_allowed_are_refused(server):
    many = Conversation((((cases.picture(1, 1),) * 17, "Count."),))
    answer = post(server, many)
    assert answer.status_code == 400
    assert "at most 16 are allowed" in answer.json()["error"]["message"]


def test_plain_conversations_are_those_of_an_engine_without_trimtab(server, folder, tmp_path):
    out = tmp_path / "stock.json"
    module = "tests.integration.stock_images"
    command = [sys.executable, "-m", module, str(folder), str(out), json.dumps(ENGINE)]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    for case, stock in zip((SHORT, LONG), json.loads(out.read_text()), strict=True):
        answer = ask(server, case, None, cache_salt="alone", logit_bias=None)
        tokens = answer["prompt_token_ids"][1:]
        prompt = [
            entry[str(token)]["logprob"]
            for token, entry in zip(tokens, answer["prompt_logprobs"][1:], strict=True)
        ]
        made = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
        ours = {"tokens": answer["choices"][0]["token_ids"], "prompt": prompt, "made": made}
        assert ours == stock
