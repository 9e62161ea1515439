"""What methods observe, and what they make of it, against a dense forward in float32.

Prompts come in chunks of 64, beside others; the KV cache is small enough for preemptions. Where a
method draws a line, the dense forward says where there is room for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from calibrators import reference
from tests.integration import observers
from tests.integration.dense import Dense, Seen
from tests.integration.plugins import install
from tests.integration.serving import Server, serving

NEW_TOKENS = 12
STRENGTH = 0.3
TOLERANCE = 1e-3
# Of the largest value; 1.2e-5 was the worst of a hundred.
SEEN = 1e-4
CHANNELS = [3, 77, 401]
FLAGS = ["--calibrators", "zerotuning,peaks,block,loud", "--dtype", "float32"]
FLAGS += ["--max-model-len", "1024", "--max-num-batched-tokens", "64", "--block-size", "32"]
FLAGS += ["--max-num-seqs", "16", "--num-gpu-blocks-override", "50"]
# Traced as for torch.compile, and not optimised: that takes a minute and changes no hook.
TRACED = ["--no-enforce-eager", "--compilation-config", '{"backend": "eager"}']
WAYS = {"eager": [], "compiled": TRACED}


@dataclass
class Observed:
    """A running server, and where its calibrators write down what they saw."""

    server: Server
    folder: Path

    def seen(self, record: str, layer: int) -> list[np.ndarray]:
        files = sorted(self.folder.joinpath(record, str(layer)).iterdir())
        return [np.load(file) for file in files]


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def running(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observers")
    source = Path(observers.__file__).read_text()
    env = install(folder, "observers", source, observers.ENTRY_POINTS)
    env["OBSERVED"] = str(folder / "observed")
    with serving(folder / "log", *FLAGS, *request.param, env=env) as server:
        yield Observed(server, folder / "observed")


@pytest.fixture(scope="module")
def dense(model: Path) -> Dense:
    return Dense(model)


@pytest.fixture(scope="module")
def text(model: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens: list[int] = tokenizer((Path(__file__).parents[2] / "LICENSE").read_text())["input_ids"]
    return tokens


@dataclass
class Case:
    """A request, and what it means densely.

    The first dense run, over the prompt, draws each layer's line where its values are furthest
    apart; what it saw there is what the server has to see.
    """

    tokens: list[int]
    settings: dict[str, Any] | None
    layers: tuple[int, ...] = ()
    seen: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, float] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any] | None:
        if self.settings is None:
            return None
        return self.settings | {"bounds": {str(n): b for n, b in self.bounds.items()}}

    def drawn(self, dense: Dense) -> Case:
        if self.settings is not None:
            self.look(dense)
            dense.log_probabilities(self.tokens, self.act)
        return self

    def look(self, dense: Dense) -> None:
        """See whatever has to be seen before the forward in which it is acted on."""

    def observe(self, seen: Seen, p: Tensor) -> Tensor:
        raise NotImplementedError

    def amounts(self, observed: Tensor) -> Tensor:
        return observed

    def found(self, seen: Seen, p: Tensor) -> Tensor:
        """Which of the amounts exceed the layer's line."""
        layer = seen.layer
        if layer not in self.seen:
            self.seen[layer] = self.observe(seen, p)
            amounts = self.amounts(self.seen[layer])
            bound = self.bounds.setdefault(layer, line(amounts))
            assert ((amounts - bound).abs() > 1e-4 * bound).all()
        return self.amounts(self.seen[layer]) > self.bounds[layer]

    def act(self, seen: Seen, p: Tensor) -> Tensor:
        return p


def line(amounts: Tensor) -> float:
    """A number between the values that are furthest apart, some of the higher ones above it."""
    ordered = amounts.sort().values
    start = len(ordered) * 2 // 3
    ratios = ordered[start:-1] / ordered[start - 1 : -2]
    index = start + int(ratios.argmax())
    assert ratios.max() > 1.001
    return float((ordered[index - 1] + ordered[index]) / 2)


def turned_down(p: Tensor, keys: Tensor) -> Tensor:
    pool = torch.isin(torch.arange(p.shape[-1]), keys)
    weighted = torch.where(pool, p * STRENGTH, p)
    total = weighted.sum(-1, keepdim=True)
    alone = torch.where(pool, 0, p).sum(-1, keepdim=True) <= 1e-6
    return torch.where(alone, p, weighted / total)


class PeaksCase(Case):
    def observe(self, seen: Seen, p: Tensor) -> Tensor:
        stream = seen.stream[: len(self.tokens)]
        return reference.residual_peaks(stream, torch.tensor(CHANNELS))

    def act(self, seen: Seen, p: Tensor) -> Tensor:
        return turned_down(p, self.found(seen, p).nonzero()) if seen.layer in self.layers else p


class BlockCase(Case):
    source = 11

    def look(self, dense: Dense) -> None:
        length = len(self.tokens)
        at = sorted({length // 2, length // 2 + 1, length - 8, length - 2})
        spans = [[2, length // 4], [length // 3, length // 3 + 9]]
        self.settings |= {"source": self.source, "at": at, "spans": spans}
        self.keys = torch.cat([torch.arange(*span) for span in spans])

        def keep(seen: Seen, p: Tensor) -> Tensor:
            if seen.layer == self.source:
                self.block = p[at][..., self.keys].transpose(0, 1)
            return p

        dense.log_probabilities(self.tokens, keep)

    def observe(self, seen: Seen, p: Tensor) -> Tensor:
        return self.block

    def amounts(self, observed: Tensor) -> Tensor:
        return observed.mean((0, 1))

    def act(self, seen: Seen, p: Tensor) -> Tensor:
        if seen.layer not in self.layers:
            return p
        rows = torch.arange(len(p))[:, None, None] >= len(self.tokens) - 1
        return torch.where(rows, turned_down(p, self.keys[self.found(seen, p)]), p)


class LoudCase(Case):
    @property
    def body(self) -> Any:
        loud = super().body
        weights = {"method": "zerotuning", "gamma": self.gamma}
        return loud if self.gamma is None else [loud, weights]

    gamma: float | None = None

    def observe(self, seen: Seen, p: Tensor) -> Tensor:
        return seen.outputs(p, len(self.tokens) - 1)

    def amounts(self, observed: Tensor) -> Tensor:
        return observed.norm(dim=-1)

    def act(self, seen: Seen, p: Tensor) -> Tensor:
        if self.gamma is not None:
            p = reference.zerotuning(p, torch.tensor(self.gamma))
        if seen.layer not in self.layers:
            return p
        first = 0 if self.settings["whole"] else len(self.tokens) - 1
        rows = torch.arange(len(p))[:, None, None] >= first
        scale = torch.where(self.found(seen, p), STRENGTH, 1.0)
        return torch.where(rows, p * scale[:, None], p)


def peaks(tokens: list[int], record: str) -> Case:
    settings = {"method": "peaks", "record": record, "channels": CHANNELS}
    return PeaksCase(tokens, settings, (0, 4, 17, 29))


def block(tokens: list[int], record: str) -> Case:
    return BlockCase(tokens, {"method": "block", "record": record}, (3, 11, 12, 20))


def loud(tokens: list[int], record: str, *, whole: bool, gamma: float | None = None) -> Case:
    case = LoudCase(tokens, {"method": "loud", "record": record, "whole": whole}, (1, 18, 29))
    case.gamma = gamma
    return case


def complete(server: Server, case: Case, *, prompt: bool = True, tokens: int = NEW_TOKENS) -> Any:
    body: dict[str, Any] = {
        "prompt": case.tokens,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        "calibration": case.body,
    }
    # vLLM does not read the prefix cache for those who want log-probabilities of the prompt.
    body |= {"prompt_logprobs": 0} if prompt else {}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(running: Observed, dense: Dense, case: Case, answer: Any) -> None:
    """Log-probabilities of an answer, and what the server saw on its way to it."""
    choice = answer["choices"][0]
    sequence = [*case.tokens, *choice["token_ids"]]
    expected = dense.log_probabilities(sequence, case.act)
    given = choice.get("prompt_logprobs") or [None]
    pairs = zip(case.tokens[1:], given[1:], strict=False)
    measured = [entry[str(token)]["logprob"] for token, entry in pairs]
    measured += choice["logprobs"]["token_logprobs"]
    deviation = (torch.tensor(measured) - expected[-len(measured) :]).abs().max().item()
    assert deviation < TOLERANCE, (case.settings, len(case.tokens), deviation)
    if case.settings is not None:
        for layer in case.layers:
            seen = torch.from_numpy(running.seen(case.settings["record"], layer)[-1])
            expected = case.seen[layer]
            error = (seen - expected).abs().max() / expected.abs().max()
            assert error < SEEN, (case.settings, layer, error)


def together(running: Observed, cases: list[Case], **options: Any) -> list[Any]:
    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(lambda case: complete(running.server, case, **options), cases))


def mixed(text: list[int], record: str, shift: int = 0) -> list[Case]:
    def part(start: int, length: int) -> list[int]:
        return text[start + shift : start + shift + length]

    return [
        peaks(part(0, 300), f"{record}-peaks-long"),
        Case(part(40, 150), None),
        block(part(500, 200), f"{record}-block-long"),
        loud(part(900, 130), f"{record}-loud-split", whole=False),
        loud(part(1100, 60), f"{record}-loud-whole", whole=True),
        peaks(part(1200, 63), f"{record}-peaks-short"),
        block(part(1300, 65), f"{record}-block-short"),
        loud(part(1400, 100), f"{record}-loud-weighed", whole=False, gamma=0.4),
        loud(part(1500, 50), f"{record}-loud-weighed-whole", whole=True, gamma=0.4),
        Case(part(1600, 17), None),
    ]


def test_mixed_batches_in_chunks(running, dense, text):
    cases = [case.drawn(dense) for case in mixed(text, "mixed")]
    for case, answer in zip(cases, together(running, cases), strict=True):
        check(running, dense, case, answer)


def test_what_is_acted_on_shows(dense, text):
    for case in mixed(text, ""):
        if case.settings is not None:
            case.drawn(dense)
            tokens = [*case.tokens, *text[2200:2212]]
            plain = dense.log_probabilities(tokens, lambda seen, p: p)
            acted = dense.log_probabilities(tokens, case.act)
            assert (plain - acted)[-12:].abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("running", [WAYS["eager"]], ids=["eager"], indirect=True)
def test_preempted_requests(running, dense, text):
    before = running.server.metric("vllm:num_preemptions_total")
    cases = [case.drawn(dense) for case in mixed(text, "preempted", 30)]
    answers = together(running, cases, tokens=100)
    assert running.server.metric("vllm:num_preemptions_total") > before
    for case, answer in zip(cases, answers, strict=True):
        check(running, dense, case, answer)


def statistics(answer: Any) -> Any:
    (entry,) = answer["calibration"]["applied"]
    return entry["statistics"]


def test_peaks_of_cached_tokens(running, dense, text):
    first = peaks(text[700:900], "cached").drawn(dense)
    hits = running.server.metric("vllm:prefix_cache_hits_total")
    complete(running.server, Case(first.tokens, None), prompt=False)
    answers = [complete(running.server, first, prompt=False) for _ in range(2)]
    assert running.server.metric("vllm:prefix_cache_hits_total") == hits + 192
    for answer in answers:
        check(running, dense, first, answer)
    assert statistics(answers[0]) == statistics(answers[1])
    everything = running.seen("cached", 17)
    # Chunks of 64, the last of 8; then that chunk alone.
    assert len(everything) == 5
    assert np.array_equal(everything[3][:192], everything[4][:192])
    longer = PeaksCase(text[700:980], first.settings, first.layers, bounds=dict(first.bounds))
    check(running, dense, longer, complete(running.server, longer, prompt=False))
    assert running.server.metric("vllm:prefix_cache_hits_total") == hits + 192 + 192


def test_blocks_of_a_prompt_that_is_asked_twice(running, dense, text):
    case = block(text[1000:1150], "twice").drawn(dense)
    hits = running.server.metric("vllm:prefix_cache_hits_total")
    answers = [complete(running.server, case, prompt=False) for _ in range(2)]
    assert running.server.metric("vllm:prefix_cache_hits_total") == hits
    for answer in answers:
        check(running, dense, case, answer)
    assert statistics(answers[0]) == statistics(answers[1])
    one, other = running.seen("twice", 11)
    assert np.array_equal(one, other)
