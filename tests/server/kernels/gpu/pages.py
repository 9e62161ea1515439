"""Problems of `tests.server.kernels.paging` as a GPU's kernels take them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from server.kernels import gpu
from server.kernels.partials import Changes, StridedCache
from tests.server.kernels.paging import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = ("NHD", "HND")


def strided(case: Problem, layout: str) -> StridedCache:
    """The problem's pages as vLLM lays them out: `[pages, kv_heads, block, 2 * head_dim]`.

    NHD keeps the heads of a token side by side, HND the tokens of a head.
    """
    pages, kv_heads = case.cache.pages.shape[:2]
    head_dim = case.query.shape[2]
    block = case.cache.pages.shape[3] // head_dim
    keys = case.cache.pages[:, :, 0].view(pages, kv_heads, head_dim, block).transpose(2, 3)
    values = case.cache.pages[:, :, 1].view(pages, kv_heads, block, head_dim)
    both = torch.cat([keys, values], -1)
    if layout == "NHD":
        both = both.transpose(1, 2).contiguous().transpose(1, 2)
    both = both.to(DEVICE)
    table = case.cache.block_table.to(DEVICE)
    return StridedCache(both[..., :head_dim], both[..., head_dim:], table)


def attention(
    case: Problem, heads: Tensor, layout: str = "NHD", stock: Tensor | None = None
) -> gpu.Attention:
    """What the GPU kernels read of a problem."""
    known = None if stock is None else stock.to(DEVICE)
    query = case.query.to(DEVICE)
    return gpu.Attention(query, strided(case, layout), case.rows, heads, case.geometry, known)


def changes(rows: int, query_heads: int) -> Changes:
    """Nothing so far, on the device."""
    none = Changes.none(rows, query_heads)
    fields = {name: getattr(none, name).to(DEVICE) for name in ("count", "before", "after")}
    return replace(none, **fields, finite=none.finite.to(DEVICE))
