"""VAR and GIFT in the steps of an engine, against the dense equations."""

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.gift import GIFT, GIFTSettings
from calibrators.interface import Prompt, Span
from calibrators.var import VAR, VARSettings
from server.receipts import counts
from tests.server.engine.toy import HEADS, Toy, check, clear_of

LENGTH, NEW = 48, 3
TOTAL = LENGTH + NEW
IMAGES = (Span(3, 20), Span(24, 30))
PROMPT = Prompt(LENGTH, IMAGES, (Span(31, 45),), (Span(33, 34), Span(37, 39), Span(40, 41)))
CONTENT = [33, 37, 38, 40]
SINKS = [0, 5, 11, 26, 32]
CHANNELS, TAU = [7, 90], 8.0
ALPHA, BETA, SALIENCY = 3.0, 0.8, 1


def positions(spans):
    inside = torch.zeros(TOTAL, dtype=torch.bool)
    for span in spans:
        inside[span.start : span.stop] = True
    return inside


VISUAL, QUERY = positions(IMAGES), positions(PROMPT.query)


@pytest.fixture
def toy(table):
    """The prompt `a` has sinks in its residual stream, `p` runs beside."""
    toy = Toy(table, {"a": TOTAL, "p": 60})
    toy.embeddings["a"][SINKS, CHANNELS[0]] = 60.0
    return toy


@pytest.fixture
def ask(toy, facts, extra_args):
    def make(method, settings):
        bound = method.bind(settings, facts)
        toy.table.add("a", extra_args(bound), PROMPT, 0)
        return toy.table.get("a").programs[0]

    return make


def run(toy, cuts):
    """The prompt in pieces and what is generated, token by token, beside another request."""
    spans = [*cuts, *((i, i + 1) for i in range(LENGTH, TOTAL))]
    steps = [toy.step({"p": (i, i + 1), "a": span}) for i, span in enumerate(spans)]
    return torch.cat([step["a"] for step in steps])


def redistributed(toy, layers, settings):
    """The rewrite that VAR means, and what it counts on its way."""
    text = ~VISUAL & (torch.arange(TOTAL) >= IMAGES[0].stop)
    seen = []

    def rewrite(layer, p):
        if layer not in layers:
            return p
        peaks = reference.residual_peaks(toy.hidden, torch.tensor(CHANNELS))
        clear_of(peaks, TAU)
        sinks = (peaks > TAU) & (torch.arange(TOTAL) < LENGTH)
        strength = settings.rho, settings.min_visual_mass
        rows = p[text]
        changed = reference.var(rows, VISUAL, sinks, settings.share, *strength)
        selected = reference.var_selected(rows, VISUAL, sinks, *strength)
        others = VISUAL & ~sinks
        seen.append((sinks, selected, rows[..., others].sum(-1), changed[..., others].sum(-1)))
        result = p.clone()
        result[text] = changed
        return result

    return rewrite, seen


@pytest.mark.parametrize("size", [LENGTH, 17, 1])
def test_var_in_any_chunks(toy, ask, size):
    settings = VARSettings(tau=TAU, layers=[0, 2], sink_dims=CHANNELS, rho=0.6)
    program = ask(VAR(), settings)
    found = run(toy, [(i, min(i + size, LENGTH)) for i in range(0, LENGTH, size)])
    rewrite, seen = redistributed(toy, [0, 2], settings)
    check(toy, "a", rewrite, found)
    seen = seen[:2]
    assert [sinks.nonzero()[:, 0].tolist() for sinks, *_ in seen] == [SINKS, SINKS]
    selected, before, after = (torch.stack([each[n] for each in seen]) for n in (1, 2, 3))
    assert 0 < selected.sum() < selected.numel()
    shown = counts(program.tally)
    assert shown["skipped"] is None
    assert shown["statistics"] == {
        "visual_sinks": 3.0,
        "text_sinks": 2.0,
        "selected_share": pytest.approx(float(selected.double().mean()), abs=1e-6),
        "visual_nonsink_mass_before": pytest.approx(float(before.mean()), abs=1e-5),
        "visual_nonsink_mass_after": pytest.approx(float(after.mean()), abs=1e-5),
    }
    rewritten = selected.any(0).any(-1)
    assert shown["completion_tokens"] == int(rewritten[-NEW:].sum())
    assert shown["prompt_tokens"] == int(rewritten[:-NEW].sum())


def test_var_without_sinks_is_a_skip(toy, ask):
    program = ask(VAR(), VARSettings(tau=1e6, layers=[1], sink_dims=CHANNELS))
    found = run(toy, [(0, LENGTH)])
    check(toy, "a", lambda layer, p: p, found)
    shown = counts(program.tally)
    assert shown["skipped"].startswith("no image token is an attention sink")
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (0, 0)


def enhanced(toy, layers):
    """The rewrite that GIFT means, its row of means of r and visual masses."""
    blocks, seen = [], []

    def record(layer, p):
        if layer == SALIENCY:
            blocks.append(p)
        return p

    toy.dense("a", record)
    saliency = reference.gift_saliency(blocks[0][:LENGTH, :, :LENGTH], CONTENT, VISUAL[:LENGTH])
    weights = torch.zeros(TOTAL, dtype=torch.float64)
    weights[VISUAL] = torch.exp(ALPHA * saliency)

    def rewrite(layer, p):
        if layer not in layers:
            return p
        rows = p[LENGTH - 1 :]
        for mass in (rows[..., VISUAL].sum(-1), rows[..., QUERY].sum(-1)):
            clear_of(mass.sort(-1).values.diff(dim=-1), 0.0)
        changed = reference.gift(rows, VISUAL, weights.to(p), QUERY, BETA)
        seen.append((rows[..., VISUAL].sum(-1), changed[..., VISUAL].sum(-1)))
        return torch.cat([p[: LENGTH - 1], changed])

    return rewrite, seen


CUTS = [[(0, 47), (47, 48)], [(0, 20), (20, 37), (37, 47), (47, 48)]]


@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "pieces"])
def test_gift_when_the_map_is_complete(toy, ask, cuts):
    settings = GIFTSettings(alpha=ALPHA, beta=BETA, saliency_layer=SALIENCY, layers=[0, 2])
    program = ask(GIFT(), settings)
    found = run(toy, cuts)
    rewrite, seen = enhanced(toy, [0, 2])
    check(toy, "a", rewrite, found)
    before, after = (torch.stack([each[n] for each in seen[:2]]) for n in (0, 1))
    shown = counts(program.tally)
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (1, NEW)
    assert shown["skipped"] is None
    assert shown["statistics"].pop("mean_r") > BETA
    assert shown["statistics"] == {
        "content_words": 3.0,
        "visual_mass_before": pytest.approx(float(before.mean()), abs=1e-5),
        "visual_mass_after": pytest.approx(float(after.mean()), abs=1e-5),
    }
    assert program.tally.count == 2 * HEADS * (1 + NEW)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (VAR(), VARSettings(tau=TAU, layers=[1], sink_dims=CHANNELS, share=0)),
        (GIFT(), GIFTSettings(alpha=0, saliency_layer=SALIENCY, layers="all")),
    ],
    ids=["var", "gift"],
)
def test_neutral_parameters_keep_every_bit(toy, ask, method, settings):
    plain = run(toy, CUTS[0])
    program = ask(method, settings)
    assert torch.equal(run(toy, CUTS[0]), plain)
    assert program.tally.completion_tokens == NEW
    assert np.flatnonzero(program.active).tolist() == ([1] if method.name == "var" else [0, 1, 2])
