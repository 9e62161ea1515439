import numpy as np
import pytest
import torch

from calibrators.interface import LayerPlan, Pool, Span, Threshold
from server.engine.pools import LayerPools, pool_map, stacked
from server.kernels.partials import PoolMap, PoolTable

HEADS = np.ones(3, np.bool_)


def keys(*positions):
    return np.array(positions, np.int64)


def layer(*pools, generated=None, own=slice(0, 3)):
    plan = LayerPlan(HEADS, {}, pools, generated)
    return LayerPools.of(plan, len(pools), 3, own)


@pytest.mark.parametrize(
    ("pools", "keys", "offsets"),
    [
        ([([0],), ([0],)], [0, 0], [[0, 1], [1, 2]]),
        ([([0, 3], []), ([], [7]), ([], [])], [0, 3, 7], [[0, 2, 2], [2, 2, 3], [3, 3, 3]]),
        ([(), ()], [], [[0], [0]]),
    ],
)
def test_pools_as_compressed_rows(pools, keys, offsets):
    found = pool_map([tuple(np.array(pool, np.int32) for pool in slot) for slot in pools])
    assert found.keys.tolist() == keys
    assert found.offsets.tolist() == offsets
    assert found.pools == len(pools[0])
    assert (str(found.keys.dtype), str(found.offsets.dtype)) == ("torch.int32", "torch.int32")


def test_lists_of_keys_stay_simple():
    found = stacked([layer(Pool(keys(1, 4))), LayerPools.none(1)], [8, 8], 3)
    assert isinstance(found, PoolMap)
    assert (found.keys.tolist(), found.offsets.tolist()) == ([1, 4], [[0, 2], [2, 2]])


def described(table, slot, half, head, pool=0):
    """Keys, span and bound of a pool."""
    assert isinstance(table, PoolTable)
    index = table.sets[slot, half, head]
    start, stop = table.listed.offsets[index, pool : pool + 2]
    span, above = table.spans[index, pool], table.above[index, pool]
    return table.listed.keys[start:stop].tolist(), tuple(span.tolist()), tuple(above.tolist())


NONE, EVERY = (0, 0), (-1.0, 0.0)


def test_keys_by_head_beside_a_neighbours_for_all():
    by_head = layer(Pool([keys(0), keys(), keys(2, 3)]))
    table = stacked([layer(Pool(keys(5))), by_head], [8, 9], 3)
    assert [described(table, 0, 0, head) for head in range(3)] == [([5], NONE, EVERY)] * 3
    for half in (0, 1):
        found = [described(table, 1, half, head)[0] for head in range(3)]
        assert found == [[0], [], [2, 3]]
    assert table.prompts.tolist() == [8, 9]


def test_a_rank_has_the_keys_of_its_heads():
    pools = layer(Pool([keys(0), keys(1), keys(2)]), own=slice(1, 3))
    table = stacked([pools], [8], 2)
    assert [described(table, 0, 0, head)[0] for head in range(2)] == [[1], [2]]


def test_generated_rows_have_pools_of_their_own():
    row = Pool(Span(1, 10**12), above=Threshold(0.5, relative=True))
    table = stacked([layer(Pool(keys(3), above=Threshold(0.25)), generated=(row,))], [8], 3)
    assert described(table, 0, 0, 2) == ([3], NONE, (0.25, 0.0))
    assert described(table, 0, 1, 2) == ([], (1, 2**31 - 1), (0.0, 0.5))


def test_types_of_the_table():
    table = stacked([layer(Pool(Span(0, 4)), Pool(keys(7)))], [8], 3)
    fields = (table.listed.keys, table.listed.offsets, table.spans, table.sets, table.prompts)
    assert all(field.dtype == torch.int32 for field in fields)
    assert table.above.dtype == torch.float32
    assert table.pools == 2
    assert described(table, 0, 0, 0, 1) == ([7], NONE, EVERY)


def weights(*numbers):
    return np.array(numbers, np.float64)


def weights_of(table, slot, half, head, pool=0):
    index = table.sets[slot, half, head]
    start, stop = table.listed.offsets[index, pool : pool + 2]
    return table.weights[start:stop].tolist()


def test_weights_lie_beside_their_keys():
    weighted = layer(Pool(keys(1, 4), weights(2, 0.5)), Pool(keys(7)))
    neighbour = layer(
        Pool(keys(5)), Pool(keys(0, 3), weights(-1, 3)), generated=(Pool(keys()),) * 2
    )
    table = stacked([weighted, neighbour, LayerPools.none(2)], [8, 8, 8], 3)
    assert str(table.weights.dtype) == "torch.float32"
    assert [weights_of(table, 0, 0, 2, pool) for pool in (0, 1)] == [[2, 0.5], [0]]
    assert [weights_of(table, 1, 0, 0, pool) for pool in (0, 1)] == [[0], [-1, 3]]
    assert weights_of(table, 1, 1, 0, 1) == weights_of(table, 2, 0, 0) == []
    # One set for all heads is enough, and for generated rows that have the pools of the prompt.
    assert len(table.spans) == 4


def test_weights_by_head_beside_keys_for_all():
    pool = Pool(keys(1, 4), [weights(1, 2), weights(3, 4), weights(5, 6)])
    table = stacked([layer(pool, own=slice(1, 3))], [8], 2)
    assert [weights_of(table, 0, 0, head) for head in range(2)] == [[3, 4], [5, 6]]
    assert [described(table, 0, 0, head)[0] for head in range(2)] == [[1, 4]] * 2


def test_without_weights_there_is_no_table_of_them():
    table = stacked([layer(Pool(Span(0, 4)))], [8], 3)
    assert table.weights is None
    assert table.arrays[2].size == 0


@pytest.mark.parametrize(
    "pool",
    [
        Pool(keys(1), weights()),
        Pool(keys(1), weights(1, 2)),
        Pool(keys(1), weights(1)[None]),
        Pool(keys(1), weights(np.nan)),
        Pool(keys(1), weights(np.inf)),
        Pool(keys(1), weights(1e39)),
        Pool(Span(0, 1), weights(1)),
        Pool([keys(1)] * 3, weights(1)),
        Pool([keys(1)] * 3, [weights(1)] * 2),
        Pool([keys(1), keys(), keys(2)], [weights(1)] * 3),
        Pool(keys(1), [weights(1)] * 4),
        Pool(keys(1), [weights(1), weights(1), weights(1, 2)]),
    ],
    ids=str,
)
def test_weights_that_are_not_finite_or_do_not_fit_are_refused(pool):
    with pytest.raises(ValueError, match="weights"):
        layer(pool)
