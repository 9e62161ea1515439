"""What the kernels take and give, whatever the device.

Keys and values live in pages: key `j` of a request is slot `j % block` of page
`block_table[request, j // block]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Prompt rows share the keys they read; more rows per tile than this no longer pay.
TILE = 16


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Keys and values of one layer.

    Attributes:
        pages: `[pages, kv_heads, 2, head_dim * block]`, contiguous, float32, bfloat16 or float16.
            Index 0 of the third dimension holds keys `[head_dim, block]`, so that one channel
            of successive keys is contiguous; index 1 holds values `[block, head_dim]`.
        block_table: int32 `[requests, pages per request]`.
    """

    pages: Tensor
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """How the layer forms logits.

    Attributes:
        scale: factor on `q . k`.
        soft_cap: logits become `soft_cap * tanh(logit / soft_cap)`; 0 for none.
        window: a row at `i` sees keys `j > i - window`; 0 for all.
        alibi_slopes: float32 `[query_heads]`, empty for none.
        sinks: float32 `[query_heads]`, a learned logit without a value; empty for none.
    """

    scale: float
    soft_cap: float
    window: int
    alibi_slopes: Tensor
    sinks: Tensor


@dataclass(frozen=True, slots=True)
class RowMap:
    """The calibrated rows of a step, in tiles of neighbouring rows of one request.

    Attributes:
        token: int64 `[rows]`, the row of the query and output tensors.
        request: int32 `[rows]`, the row of the block table.
        slot: int32 `[rows]`, the calibrated request among those of the step.
        position: int32 `[rows]`, absolute position, which is also the last visible key.
        tiles: int32 `[tiles + 1]`, where each tile starts; at most `TILE` rows, all of one
            request and at successive positions.
    """

    token: Tensor
    request: Tensor
    slot: Tensor
    position: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class PoolMap:
    """Pooled keys by slot, as compressed rows.

    Attributes:
        keys: int32 `[entries]`, positions.
        offsets: int32 `[slots, pools + 1]`; pool `g` of slot `s` is
            `keys[offsets[s, g] : offsets[s, g + 1]]`, ascending.
    """

    keys: Tensor
    offsets: Tensor

    @property
    def pools(self) -> int:
        """Number of pools of every slot."""
        return self.offsets.shape[1] - 1


@dataclass(frozen=True, slots=True)
class Partials:
    """Measured pools; zero on heads that are not selected.

    Attributes:
        mass: float32 `[rows, query_heads, pools]`, `m_g = sum p_j`, in [0, 1].
        value: float32 `[rows, query_heads, pools, head_dim]`, `U_g = sum p_j v_j`.
    """

    mass: Tensor
    value: Tensor
