"""A toy decoder of a few attention layers: in paged steps as the engine runs it, and dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from calibrators import reference
from server.engine.batch import members
from server.engine.requests import RequestTable
from server.engine.step import Planner
from server.kernels.partials import AttentionGeometry, PagedCache

LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 3, 6, 2, 32, 32
PAGES = 4
SCALE = HEAD_DIM**-0.5
Rewrite = Callable[[int, Tensor], Tensor]
EPS = torch.finfo(torch.float32).eps


class Toy:
    """Each layer adds its attention, calibrated or not, to the residual stream.

    Args:
        table: state of calibrated requests.
        lengths: tokens of each request, generated ones included; their embeddings are random.
        cache: makes what kernels get of pages and block table.
    """

    def __init__(
        self,
        table: RequestTable,
        lengths: Mapping[str, int],
        cache: Callable[[Tensor, Tensor], Any] = PagedCache,
    ) -> None:
        self.cache = cache
        generator = torch.Generator().manual_seed(7)
        width = HEADS * HEAD_DIM

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.weights = [
            tuple(normal(width, n * HEAD_DIM) / width**0.5 for n in (HEADS, KV_HEADS, KV_HEADS))
            for _ in range(LAYERS)
        ]
        self.embeddings = {name: normal(length, width) for name, length in lengths.items()}
        self.table, self.planner = table, Planner()
        none = torch.empty(0)
        self.geometry = AttentionGeometry(SCALE, 0.0, 0, none, none)
        pages = PAGES * len(lengths)
        shape = pages, KV_HEADS, 2, HEAD_DIM * BLOCK
        self.pages = [torch.full(shape, float("nan")) for _ in range(LAYERS)]
        tables = torch.randperm(pages, generator=generator).int().view(-1, PAGES)
        self.tables = dict(zip(lengths, tables, strict=True))

    def project(self, layer: int, hidden: Tensor) -> list[Tensor]:
        """Queries, keys and values `[tokens, heads, head_dim]`."""
        weights = self.weights[layer]
        # Logits that grew from layer to layer would enlarge every rounding.
        hidden = hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()
        return [(hidden @ w.to(hidden)).view(len(hidden), -1, HEAD_DIM) for w in weights]

    def step(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Run positions `start <= i < stop` of each request together; their final hidden states."""
        sizes = [stop - start for start, stop in spans.values()]
        edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        batch = members(self.table, [*spans], edges, [stop for _, stop in spans.values()])
        plan = self.planner.plan(batch)
        followed = plan.followed()
        hidden = torch.cat([self.embeddings[n][slice(*span)] for n, span in spans.items()])
        block_table = torch.stack([self.tables[name] for name in spans])
        for layer in range(LAYERS):
            if layer in followed:
                # The stream comes as a sum, but for the first layer's; this one is exact.
                whole = hidden.round()
                plan.enter(layer, *((hidden - whole, whole) if layer else (hidden, None)))
            query, key, value = self.project(layer, hidden)
            stock = torch.empty_like(query)
            parts = [slice(*ends) for ends in pairwise(edges)]
            # A request may read what another writes in the same step.
            for (name, (start, _)), rows in zip(spans.items(), parts, strict=True):
                self._write(layer, name, start, key[rows], value[rows])
            for (name, (start, stop)), rows in zip(spans.items(), parts, strict=True):
                stock[rows] = self._attend(query[rows], *self._read(layer, name, stop), start)
            output = stock.clone()
            cache = self.cache(self.pages[layer], block_table)
            plan.apply(layer, query, output, cache, self.geometry)
            for name, rows in zip(spans, parts, strict=True):
                if self.table.get(name) is None:
                    assert torch.equal(output[rows], stock[rows])
            hidden = hidden + output.flatten(1)
        plan.finish()
        return dict(zip(spans, hidden.split(sizes), strict=True))

    def _write(self, layer: int, name: str, start: int, key: Tensor, value: Tensor) -> None:
        """Put keys and values into the pages."""
        for i in range(len(key)):
            index, j = divmod(start + i, BLOCK)
            page = self.pages[layer][self.tables[name][index]]
            page[:, 0].view(KV_HEADS, HEAD_DIM, BLOCK)[:, :, j] = key[i]
            page[:, 1].view(KV_HEADS, BLOCK, HEAD_DIM)[:, j] = value[i]

    def _read(self, layer: int, name: str, stop: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a request so far."""
        own = self.pages[layer][self.tables[name].long()]
        keys = own[:, :, 0].view(PAGES, KV_HEADS, HEAD_DIM, BLOCK).permute(0, 3, 1, 2)
        values = own[:, :, 1].view(PAGES, KV_HEADS, BLOCK, HEAD_DIM).permute(0, 2, 1, 3)
        return keys.flatten(0, 1)[:stop], values.flatten(0, 1)[:stop]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + len(query))
        p = reference.probabilities(query, key, positions, reference.Geometry(SCALE))
        return reference.attend(p, value)

    def dense(self, name: str, rewrite: Rewrite, dtype: torch.dtype = torch.float64) -> Tensor:
        """Final hidden states of the whole sequence, `rewrite(layer, probabilities)` applied.

        What enters the layer, and its values, are `self.hidden` and `self.value` meanwhile.
        """
        hidden = self.embeddings[name].to(dtype)
        positions = torch.arange(len(hidden))
        for layer in range(LAYERS):
            query, key, value = self.project(layer, hidden)
            self.hidden, self.value = hidden, value
            p = reference.probabilities(query, key, positions, reference.Geometry(SCALE))
            hidden = hidden + reference.attend(rewrite(layer, p), value).flatten(1)
        return hidden


def check(toy: Toy, name: str, rewrite: Rewrite, found: Tensor, start: int = 0) -> None:
    """Within twice the error of an independent float32 run, plus a band of float32 rounding."""
    rows = slice(start, start + len(found))
    exact = toy.dense(name, rewrite)[rows]
    rough = toy.dense(name, rewrite, torch.float32)[rows]
    budget = 2 * (rough - exact).abs().max() + 32 * EPS * exact.abs().max()
    assert (found - exact).abs().max() <= budget


def clear_of(values: Tensor, bound: float) -> None:
    """No value is so near that float32 could take it for the other side."""
    assert ((values - bound).abs() > 64 * EPS * bound).all()
