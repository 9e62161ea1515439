"""Column means and probabilities in Triton against the dense reference."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.kernels.gpu.drawing import LAYOUT, problems
from tests.server.kernels.gpu.pages import attention
from tests.server.kernels.paging import problem
from tests.server.kernels.test_columns import dense
from tests.server.kernels.test_properties import within


@settings(max_examples=6)
@given(problems(whole=True), LAYOUT, st.data())
def test_column_means_match_the_reference(case, layout, data):
    slots, query_heads = len(case.keys), case.query.shape[1]
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)]] * slots)
    got = attention(case, heads, layout).column_means().cpu()
    assert got[~heads[0]].count_nonzero() == 0
    chosen = heads[0].nonzero().flatten()
    if len(chosen):
        rough, exact = dense(case, torch.float32), dense(case, torch.float64)
        assert within(got[chosen], rough[chosen], exact[chosen])


def test_prompts_that_differ_in_heads_keep_apart():
    case = problem([40, 70], [40, 70], tile=32, block=16, heads=3, kv_heads=1)
    heads = torch.zeros(2, 3, dtype=torch.bool)
    heads[0, 1] = heads[1, 2] = True
    got, exact = attention(case, heads).column_means().cpu(), dense(case, torch.float64)
    assert within(got[1, :40], exact[1, :40].float(), exact[1, :40])
    assert within(got[2, 40:], exact[2, 40:].float(), exact[2, 40:])
    assert got.count_nonzero() == 40 + 70


@settings(max_examples=8)
@given(problems(), LAYOUT, st.data())
def test_probabilities_match_the_reference(case, layout, data):
    slots, query_heads = len(case.keys), case.query.shape[1]
    longest = max(len(key) for key in case.keys)
    keys = sorted(data.draw(st.sets(st.integers(0, longest + 3), max_size=20)))
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)]] * slots)
    got = attention(case, heads, layout).probabilities(np.array(keys, np.int32)).cpu()
    assert got.shape == (query_heads, sum(case.spans), len(keys))
    assert got[~heads[0]].count_nonzero() == 0

    def whole(dtype):
        parts = []
        for request in range(slots):
            p, _ = case.dense(request, dtype)
            padded = torch.zeros(*p.shape[:2], longest + 4, dtype=dtype)
            padded[..., : p.shape[-1]] = p
            parts.append(padded[..., keys])
        return torch.cat(parts).transpose(0, 1)[heads[0]]

    if keys and heads[0].any():
        assert within(got[heads[0]], whole(torch.float32), whole(torch.float64))
