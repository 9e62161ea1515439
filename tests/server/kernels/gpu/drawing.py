"""Problems small enough for an interpreter, around the edges of pages, blocks and splits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.server.kernels.gpu.pages import LAYOUTS
from tests.server.kernels.paging import Problem, problem

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.sampled_from([(1, 1), (1, 7), (2, 3), (2, 2)])
LAYOUT = st.sampled_from(LAYOUTS)


@st.composite
def problems(draw, whole: bool = False) -> Problem:
    """One or two requests, with few rows each; `whole` gives all rows of short ones."""
    block = draw(st.sampled_from([16, 32, 256]))
    kv_heads, group = draw(SHAPES)
    edges = st.sampled_from([1, 2, 16, 17, 63, 64, 65, 129, 150])
    lengths = draw(st.lists(st.integers(1, 40) if whole else edges, min_size=1, max_size=2))
    spans = [n if whole else min(n, draw(st.sampled_from([1, 1, 2, 5]))) for n in lengths]
    return problem(
        lengths,
        spans,
        dtype=draw(DTYPES),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 48])),
        block=block,
        tile=32,
        seed=draw(st.integers(0, 2**20)),
        window=draw(st.sampled_from([0, 0, 1, 20, 70])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
    )


@st.composite
def pooled(draw) -> tuple[Problem, list[list[list[int]]]]:
    """A problem with two disjoint pools per request: empty, whole or anything between."""
    case = draw(problems())
    pools = []
    for key in case.keys:
        owners = st.lists(st.integers(0, 2), min_size=len(key), max_size=len(key))
        owner = draw(st.sampled_from([[0] * len(key), [2] * len(key)]) | owners)
        pools.append([[j for j, g in enumerate(owner) if g == pool] for pool in (0, 1)])
    return case, pools
