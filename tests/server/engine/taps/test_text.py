"""VHR with its text pass, as an engine runs the two, against the dense equations."""

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.interface import Bound, Prompt, Span
from calibrators.registry import NAME as REGISTRABLE
from calibrators.vhr import VHR, VHRSettings
from server.engine.payload import KEY, Payload
from server.engine.text_pass import NAME, OUTPUTS, TextPass, packed, text_pass, unpacked
from tests.server.engine.toy import Toy, check

IMAGE = Span(4, 40)
LENGTH, NEW = 60, 3
TEXT = [i for i in range(LENGTH) if not IMAGE.start <= i < IMAGE.stop]
LAYERS = (0, 2)
ALPHA = 1.7


@pytest.fixture
def toy(table):
    """The prompt `text` is `a` without its image."""
    toy = Toy(table, {"a": LENGTH + NEW, "text": len(TEXT), "p": 40})
    toy.embeddings["text"] = toy.embeddings["a"][TEXT]
    return toy


@pytest.fixture
def see(toy):
    """Run the text pass in chunks of a size; what it reports."""

    def run(size=LENGTH, layers=LAYERS):
        payload = Payload("t-text", (text_pass(layers),))
        toy.table.add("text", {KEY: payload.to_extra_args()}, Prompt(len(TEXT)), 0)
        for step, start in enumerate(range(0, len(TEXT), size)):
            toy.step({"text": (start, min(start + size, len(TEXT))), "p": (step, step + 1)})
        request = toy.table.get("text")
        assert not request.failed
        (program,) = request.programs
        assert (program.tally.prompt_tokens, program.tally.completion_tokens) == (0, 0)
        return program.tally.details[OUTPUTS]

    return run


@pytest.fixture
def ask(toy, facts):
    def make(outputs, **settings):
        model = VHRSettings.model_validate({"layers": [*LAYERS], "alpha": ALPHA} | settings)
        bound = VHR().bind(model, facts)
        payload = Payload("t-a", (bound,), text_layers=LAYERS, text_outputs=outputs)
        toy.table.add("a", {KEY: payload.to_extra_args()}, Prompt(LENGTH, (IMAGE,)), 0)
        return toy.table.get("a")

    return make


def reinforced(toy, rows):
    """The rewrite that VHR means, and the heads it chooses by layer."""
    text = []

    def record(layer, p):
        text.append(reference.attend(p, toy.value)[-1])
        return p

    toy.dense("text", record)
    chosen = {}

    def rewrite(layer, p):
        if layer not in LAYERS:
            return p
        image = reference.attend(p, toy.value)[LENGTH - 1]
        heads = reference.vhr_heads(image, text[layer].to(image))
        chosen[layer] = heads.nonzero()[:, 0].tolist()
        scale = torch.where(heads, ALPHA, 1.0).to(p)[:, None]
        first = 0 if rows == "all" else LENGTH - 1
        return torch.where(torch.arange(len(p))[:, None, None] >= first, p * scale, p)

    return rewrite, chosen


CUTS = {"all": [(0, LENGTH)], "last": [(0, 30), (30, LENGTH - 1), (LENGTH - 1, LENGTH)]}


@pytest.mark.parametrize("rows", CUTS)
@pytest.mark.parametrize("size", [LENGTH, 7, 1])
def test_heads_are_chosen_by_what_the_image_changes(toy, see, ask, rows, size):
    request = ask(see(size), rows=rows)
    spans = [*CUTS[rows], *((i, i + 1) for i in range(LENGTH, LENGTH + NEW))]
    found = torch.cat([toy.step({"a": span})["a"] for span in spans])
    rewrite, chosen = reinforced(toy, rows)
    check(toy, "a", rewrite, found)
    tally = request.programs[0].tally
    assert all(chosen.values())
    assert tally.details == {"heads_selected": {str(n): chosen[n] for n in LAYERS}}
    assert tally.heads == sum(map(len, chosen.values()))
    assert (tally.prompt_tokens, tally.completion_tokens) == (LENGTH if rows == "all" else 1, NEW)


def test_a_prompt_that_comes_again_is_seen_as_before(toy, see, ask):
    request = ask(see())
    toy.step({"a": (0, LENGTH)})
    again = toy.step({"a": (0, LENGTH + NEW)})["a"]
    assert not request.failed
    check(toy, "a", reinforced(toy, "all")[0], again)


@pytest.mark.parametrize("seen", [{}, {"0": packed(np.ones((6, 32)))}])
def test_a_request_whose_text_pass_did_not_run_fails(toy, ask, seen):
    request = ask(seen)
    assert not request.failed
    toy.step({"a": (0, LENGTH)})
    assert request.failed


@pytest.mark.parametrize("outputs", ["", "AAAA", packed(np.ones((6, 31))), "?"])
def test_outputs_of_another_shape_fail_their_request(ask, outputs):
    assert ask({"0": outputs, "2": outputs}).failed


def test_outputs_that_are_not_finite_fail_their_request(toy, ask):
    outputs = np.full((6, 32), np.nan)
    request = ask({"0": packed(outputs), "2": packed(outputs)})
    toy.step({"a": (0, LENGTH)})
    assert request.failed


def test_outputs_travel_as_they_are(facts):
    outputs = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    assert np.array_equal(unpacked(packed(outputs), facts), outputs)


def test_a_text_pass_is_nothing_to_ask_for(facts):
    assert not REGISTRABLE.fullmatch(NAME)
    method = TextPass()
    assert method.bind(method.Settings(), facts) == Bound(NAME, {"layers": []}, 0, 0)
