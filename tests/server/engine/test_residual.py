"""Hooks on decoder layers, eager and traced, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import forward_context
from vllm.model_executor.layers.attention import Attention

from server.engine.residual import ResidualStream

NAMES = {f"model.layers.{index}.self_attn.attn": index for index in range(3)}


class Layer(nn.Module):
    """Takes what vLLM's Llama layers take."""

    def __init__(self, name):
        super().__init__()
        attention = Attention.__new__(Attention)
        nn.Module.__init__(attention)
        attention.layer_name = name
        self.self_attn = nn.ModuleDict({"attn": attention})

    def forward(self, positions, hidden_states, residual):
        stream = hidden_states if residual is None else hidden_states + residual
        return stream * 2, stream


class Other(Layer):
    """Takes the sum alone."""

    def forward(self, hidden_states):
        return hidden_states * 2, hidden_states


class Decoder(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layer(name) for name in NAMES)

    def forward(self, hidden):
        residual = None
        for layer in self.model.layers:
            hidden, residual = layer(None, hidden, residual=residual)
        return hidden + residual


@pytest.fixture
def shown(monkeypatch):
    """What the plan of the running step is shown."""
    seen = []
    plan = SimpleNamespace(enter=lambda layer, *parts: seen.append((layer, *parts)))
    layers = {
        name: SimpleNamespace(impl=SimpleNamespace(layer_index=index))
        for name, index in NAMES.items()
    }
    metadata = dict.fromkeys(NAMES, SimpleNamespace(calibration=plan))
    context = SimpleNamespace(attn_metadata=metadata, no_compile_layers=layers)
    monkeypatch.setattr(forward_context, "_forward_context", context)
    seen_by = SimpleNamespace(calls=seen, context=context)
    return seen_by


def streams(hidden):
    """What enters each layer."""
    found = [hidden]
    residual = None
    for _ in range(3):
        stream = hidden if residual is None else hidden + residual
        hidden, residual = stream * 2, stream
        found.append(hidden + residual)
    return found


def total(hidden, residual):
    return hidden if residual is None else hidden + residual


def test_layers_are_shown_while_they_are_followed(shown):
    model, hidden = Decoder(), torch.randn(5, 8)
    stream = ResidualStream(model, NAMES, compiled=False)
    model(hidden)
    assert shown.calls == []
    stream.follow([0, 2])
    result = model(hidden)
    assert torch.equal(result, streams(hidden)[-1])
    assert [layer for layer, *_ in shown.calls] == [0, 2]
    for layer, *parts in shown.calls:
        assert torch.equal(total(*parts), streams(hidden)[layer])
    shown.calls.clear()
    stream.follow([1])
    model(hidden)
    stream.follow([])
    model(hidden)
    assert [layer for layer, *_ in shown.calls] == [1]


def test_a_traced_model_shows_all_layers_in_their_order(shown):
    model, hidden = Decoder(), torch.randn(5, 8)
    stream = ResidualStream(model, NAMES, compiled=True)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        shown.context.attn_metadata = None  # as in a warm-up run
        traced(hidden)
        assert shown.calls == []
        shown.context.attn_metadata = dict.fromkeys(NAMES, SimpleNamespace(calibration=None))
        traced(hidden)
        assert shown.calls == []
        plan = SimpleNamespace(
            enter=lambda layer, *parts: shown.calls.append((layer, total(*parts).clone()))
        )
        shown.context.attn_metadata = dict.fromkeys(NAMES, SimpleNamespace(calibration=plan))
        stream.follow([1])
        result = traced(hidden)
    assert torch.equal(result, streams(hidden)[-1])
    assert [layer for layer, _ in shown.calls] == [0, 1, 2]
    for layer, entered in shown.calls:
        assert torch.equal(entered, streams(hidden)[layer])
    torch._dynamo.reset()


def test_layers_of_another_kind_are_not_followed(shown):
    model = Decoder(Other)
    ResidualStream(model, NAMES, compiled=False).follow([0, 1, 2])
    model.model.layers[0](torch.randn(5, 8))
    assert shown.calls == []


def test_attention_that_is_not_the_language_models_is_left_alone(shown):
    model = Decoder()
    only = dict(list(NAMES.items())[:1])
    ResidualStream(model, only, compiled=False).follow([0, 1, 2])
    model(torch.randn(5, 8))
    assert [layer for layer, *_ in shown.calls] == [0]
