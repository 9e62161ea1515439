"""How Triton kernels are launched: what is compiled in, lanes of a program, splits of long rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels.gpu_tables import DeviceRows, kept
from server.kernels.partials import AttentionGeometry, StridedCache

READABLE = (torch.float32, torch.bfloat16, torch.float16)

# A matrix product of Triton takes no fewer rows.
LEAST_LANES = 16
# Lanes of a program where rows are plenty. Unmeasured: what stock kernels use.
LANES = 64
# Keys at a time where a list of keys is read, which is short as a rule.
FEW_KEYS = 16
# Programs that keep a large GPU busy. Unmeasured: two to four for each of 132 or 144 processors.
PROGRAMS = 512
# Keys below which a split is not worth its sums.
LEAST_CHUNK = 256
MOST_SPLITS = 32


def power_of_2(least: int) -> int:
    """The least power of 2 that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()


def warps(lanes: int) -> int:
    """Warps of a program; with four, 64 lanes with their lists do not fit in registers."""
    return 8 if lanes >= LANES else 4


def strided(tokens: Tensor) -> tuple[Tensor, int, int]:
    """`[tokens, heads, head_dim]` with the strides of tokens and heads."""
    return tokens, tokens.stride(0), tokens.stride(1)


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernels of a layer are compiled for; a model never changes it.

    Attributes:
        query_heads: of this rank.
        kv_heads: of this rank.
        head_dim: channels.
        page: tokens of a page.
        block_n: keys that a program takes at a time.
        capped: whether logits have a soft cap.
        alibi: whether they have slopes.
        sinks: whether heads have learned sinks.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    page: int
    block_n: int
    capped: int
    alibi: int
    sinks: int

    @classmethod
    def of(cls, query: Tensor, cache: StridedCache, geometry: AttentionGeometry) -> Form:
        """The form of a layer.

        Raises:
            ValueError: the kernels cannot read this cache.
        """
        keys = cache.keys
        if query.dtype not in READABLE or keys.dtype != query.dtype:
            raise ValueError(f"queries are {query.dtype} and keys {keys.dtype}; {READABLE} can be")
        if keys.stride() != cache.values.stride() or keys.stride(3) != 1 or query.stride(2) != 1:
            raise ValueError(f"keys have strides {keys.stride()}, values {cache.values.stride()}")
        _, kv_heads, page, head_dim = keys.shape
        return cls(
            query.shape[1],
            kv_heads,
            head_dim,
            page,
            64 if head_dim <= 128 else 32,
            int(geometry.soft_cap > 0),
            int(len(geometry.alibi_slopes) > 0),
            int(len(geometry.sinks) > 0),
        )

    def constants(self, block_n: int | None = None) -> tuple[int, ...]:
        """`FORM` of the kernels."""
        group, padded = self.query_heads // self.kv_heads, max(power_of_2(self.head_dim), 16)
        block = self.block_n if block_n is None else block_n
        return group, self.head_dim, padded, self.page, block, self.capped, self.alibi

    def model(self, geometry: AttentionGeometry, device: torch.device) -> tuple[Any, ...]:
        """`model` of the kernels; tables that are not there are not read.

        Kept with the geometry: a layer has the same in every step, and each table is a launch.
        """

        def make() -> tuple[Any, ...]:
            numbers = float(geometry.scale), float(geometry.soft_cap), geometry.window
            tables = geometry.alibi_slopes, geometry.sinks
            return numbers, *(_or_something(table, device) for table in tables)

        return kept(geometry, device, make)

    def cache(self, cache: StridedCache) -> tuple[Any, ...]:
        """`cache` of the kernels."""
        pages, heads, slots, _ = cache.keys.stride()
        table = cache.block_table
        return cache.keys, cache.values, pages, heads, slots, table, table.stride(0)


def _or_something(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device) if len(tensor) else torch.zeros(1, device=device)


def keys_at_once(form: Form, lanes: int, pools: int) -> int:
    """Keys that a program takes at a time; fewer where many lanes look them up in lists."""
    return 32 if lanes >= LANES and pools else form.block_n


@dataclass(frozen=True, slots=True)
class Launch:
    """How the rows of a step are cut into programs.

    Attributes:
        form: of the layer.
        rows: of the step.
    """

    form: Form
    rows: DeviceRows

    def lanes(self, columns: int) -> tuple[tuple[int, int], int]:
        """`LANES`, which are rows and lanes of a program, and the parts of a tile.

        Tiles of single rows and longer ones differ, and nothing else: few forms are compiled.
        """
        each = self.form.query_heads // self.form.kv_heads * columns
        rows = 1 if self.rows.longest <= 1 else max(1, LANES // each)
        return (rows, max(LEAST_LANES, power_of_2(rows * each))), -(-self.rows.longest // rows)

    def splits(self, parts: int) -> tuple[int, int]:
        """Splits of every row, and the keys of one."""
        programs = max(1, self.rows.tiles * parts * self.form.kv_heads)
        wanted = min(-(-PROGRAMS // programs), -(-self.rows.reach // LEAST_CHUNK), MOST_SPLITS)
        block = self.form.block_n
        chunk = -(-self.rows.reach // max(wanted, 1))
        chunk = max(-(-chunk // block) * block, block)
        return max(-(-self.rows.reach // chunk), 1), chunk
