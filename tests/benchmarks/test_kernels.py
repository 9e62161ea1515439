import pytest
import torch

from benchmarks.kernels import HEAD_DIM, QUERY_HEADS, Case, flops, inputs
from calibrators import reference
from server.kernels import cpu
from server.kernels.partials import TILE


def test_flops_count_the_visible_keys_of_each_row():
    assert flops(Case(requests=2, keys=3, rows=3)) == 2 * 2 * (1 + 2 + 3) * QUERY_HEADS * HEAD_DIM
    assert flops(Case(requests=1, keys=5, rows=1)) == 2 * 5 * QUERY_HEADS * HEAD_DIM


@pytest.mark.parametrize("case", [Case(3, 150, 1), Case(2, 40, 40)])
def test_inputs_are_what_the_kernels_take(case):
    given = inputs(case, torch.float32)

    attention = cpu.Attention(given.query, given.cache, given.rows, given.heads, given.geometry)
    found = attention.pool_partials(given.pools)

    tiles = given.rows.tiles
    assert (tiles.diff() <= TILE).all()
    assert tiles[-1] == case.requests * case.rows
    for request in range(case.requests):
        rows = slice(request * case.rows, (request + 1) * case.rows)
        key = keys_of(given, request, case.keys)
        probability = reference.probabilities(
            given.query[rows], key, given.rows.position[rows], reference.Geometry(HEAD_DIM**-0.5)
        )
        torch.testing.assert_close(found.mass[rows, :, 0], probability[..., 0])


def keys_of(given, request, count):
    pages = given.cache.pages[given.cache.block_table[request].long(), :, 0]
    return pages.unflatten(-1, (HEAD_DIM, -1)).permute(0, 3, 1, 2).flatten(0, 1)[:count]
