"""Probabilities of some rows and keys against the dense reference."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels import cpu
from tests.server.kernels.paging import attention, problem
from tests.server.kernels.test_columns import two_threads  # noqa: F401 - a fixture
from tests.server.kernels.test_properties import problems, within


@settings(max_examples=60)
@given(problems(), st.data())
def test_probabilities_match_the_reference(case, data):
    slots, query_heads = len(case.keys), case.query.shape[1]
    longest = max(len(key) for key in case.keys)
    keys = sorted(data.draw(st.sets(st.integers(0, longest + 3), max_size=20)))
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)]] * slots)
    got = attention(case, heads).probabilities(np.array(keys, np.int32))
    assert got.shape == (query_heads, sum(case.spans), len(keys))
    assert got[~heads[0]].count_nonzero() == 0

    def dense(dtype):
        parts = []
        for request in range(slots):
            p, _ = case.dense(request, dtype)
            padded = torch.zeros(*p.shape[:2], longest + 4, dtype=dtype)
            padded[..., : p.shape[-1]] = p
            parts.append(padded[..., keys])
        return torch.cat(parts).transpose(0, 1)[heads[0]]

    if keys and heads[0].any():
        assert within(got[heads[0]], dense(torch.float32), dense(torch.float64))


def test_threads_change_no_bit(two_threads):  # noqa: F811
    case = problem([200, 7, 97], [30, 7, 97], dtype=torch.bfloat16)
    heads = torch.ones(3, 6, dtype=torch.bool)
    keys = np.arange(0, 190, 3, dtype=np.int32)
    parallel = attention(case, heads).probabilities(keys)
    cpu.set_threads(1)
    assert torch.equal(parallel, attention(case, heads).probabilities(keys))
