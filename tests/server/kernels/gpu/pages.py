"""Problems of `tests.server.kernels.paging` as a GPU's kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from server.kernels import gpu
from server.kernels.partials import Changes, PagedCache, StridedCache
from tests.server.kernels.paging import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = ("NHD", "HND")


def strided(cache: PagedCache, head_dim: int, layout: str = "NHD") -> StridedCache:
    """The same pages as vLLM lays them out on a GPU: `[pages, kv_heads, block, 2 * head_dim]`.

    NHD keeps the heads of a token side by side, HND the tokens of a head.
    """
    pages, kv_heads = cache.pages.shape[:2]
    block = cache.extent(head_dim)[1]
    keys = cache.pages[:, :, 0].view(pages, kv_heads, head_dim, block).transpose(2, 3)
    values = cache.pages[:, :, 1].view(pages, kv_heads, block, head_dim)
    both = torch.cat([keys, values], -1)
    if layout == "NHD":
        both = both.transpose(1, 2).contiguous().transpose(1, 2)
    both = both.to(DEVICE)
    return StridedCache(both[..., :head_dim], both[..., head_dim:], cache.block_table.to(DEVICE))


def attention(
    case: Problem, heads: Tensor, layout: str = "NHD", stock: Tensor | None = None
) -> gpu.Attention:
    """What the GPU kernels read of a problem."""
    known = None if stock is None else stock.to(DEVICE)
    query, cache = case.query.to(DEVICE), strided(case.cache, case.query.shape[2], layout)
    return gpu.Attention(query, cache, case.rows, heads, case.geometry, known)


def changes(rows: int, query_heads: int) -> Changes:
    """Nothing so far, on the device."""
    return Changes.none(rows, query_heads, DEVICE)
