"""What is counted is what the kernels and the account of a step take, whatever the method."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_figures
from benchmarks.gpu_figures import layer_of
from benchmarks.gpu_kernels import Model, Step, inputs
from calibrators import registry
from server.engine import gpu_room
from server.engine.gpu_room import Largest, Method
from server.engine.taps.blocks import AT_ONCE
from server.kernels import gpu_launch
from tests.server.kernels.gpu.kernels import runnable
from tests.server.kernels.gpu.pages import DEVICE

LAYERS = 4
SMALL = Largest(rows=10, slots=5, layers=3, query_heads=4, kv_heads=2, head_dim=16)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._held: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        for tensor in filter(_is, tree_leaves(result)):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in self._sizes or place not in given:
                self._sizes[place] = storage.nbytes()
                self._held[place] += 1
                weakref.finalize(tensor, self._drop, place)
        self.most = max(self.most, sum(self._sizes[place] for place in self._held))
        return result

    def _drop(self, place: int) -> None:
        self._held[place] -= 1
        if not self._held[place]:
            del self._held[place], self._sizes[place]


def _is(leaf) -> bool:
    return isinstance(leaf, torch.Tensor)


def methods(*names: str) -> list[Method]:
    offer = registry.load(names)
    return [Method(len(offer[name].pools), len(offer[name].parameters)) for name in names]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts allocations of the interpreter")
@pytest.mark.parametrize("requests", [1, 24])
@pytest.mark.parametrize("method", gpu_figures.ALLOWED)
def test_a_step_takes_no_more_than_is_counted(method, requests, monkeypatch):
    monkeypatch.setattr(gpu_figures, "IMAGE_TOKENS", 40)
    if requests > 1:
        # No row is split: what is counted for that would hide all else at this size.
        monkeypatch.setattr(gpu_launch, "PROGRAMS", 8)
        monkeypatch.setattr(gpu_room, "PROGRAMS", 8)
    step = Step(Model(4, 2, 16), requests, keys=80, dtype=torch.bfloat16)
    given = inputs(step, DEVICE)
    largest = Largest(requests, requests, LAYERS, 4, 2, 16)
    # A block of probabilities is none of these.
    counted = largest.room(methods(method)) - 4 * AT_ONCE
    known = torch.zeros(4, requests)
    with runnable(), Peak() as peak:
        layer = layer_of(method, step, given, known)
        for _ in range(LAYERS):
            layer()
    assert peak.most <= counted
    if requests > 1 and method in ("var", "gift"):
        assert peak.most >= counted / 4


def test_all_methods_count_and_the_largest_layer():
    one, two = methods("zerotuning"), methods("gift")
    block = 4 * AT_ONCE
    together = SMALL.room(one + two)
    assert max(SMALL.room(one), SMALL.room(two)) < together < SMALL.room(one) + SMALL.room(two)
    assert SMALL.room([]) == block


@pytest.mark.parametrize("field", ["rows", "slots", "layers", "query_heads", "head_dim"])
def test_more_of_anything_takes_more(field):
    more = replace(SMALL, **{field: 2 * getattr(SMALL, field)})
    assert more.room(methods("var")) > SMALL.room(methods("var"))
