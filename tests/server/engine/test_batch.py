from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.interface import Prompt, Rows, Span
from server.engine.batch import Member, members, row_map
from server.kernels.partials import TILE

REQUEST = SimpleNamespace(prompt=Prompt(1000))


def test_members_are_the_calibrated_rows_of_the_batch(table, add):
    first, last = add("a", 10), add("c", 4)
    add("b", 5, plain=True)
    found = members(
        table, ["a", "b", "c", "d"], query_start=[0, 10, 13, 14, 20], seq_lens=[10, 8, 30, 6]
    )
    assert found == [Member(first, 0, 0, 0, 10), Member(last, 2, 13, 29, 30)]


def test_a_one_token_chunk_is_placed_by_its_length_not_taken_for_decode(table, add):
    add("a", 10)
    (member,) = members(table, ["a"], query_start=[0, 1], seq_lens=[5])
    assert (member.start, member.stop) == (4, 5)


def test_a_batch_without_calibrated_requests(table):
    assert members(table, ["a"], [0, 3], [3]) == []


@st.composite
def batches(draw):
    """Members in a query tensor, strangers' rows between them, and their programs."""
    batch, programs, token = [], [], 0
    for row in range(draw(st.integers(1, 4))):
        token += draw(st.integers(0, 3))
        start, length = draw(st.integers(0, 60)), draw(st.integers(1, 60) | st.just(1))
        first = draw(st.integers(0, 80))
        edges = sorted(draw(st.lists(st.integers(0, 120), min_size=4, max_size=4)))
        skip = (Span(*edges[:2]), Span(*edges[2:])) if draw(st.booleans()) else ()
        batch.append(Member(REQUEST, 2 * row, token, start, start + length))
        programs.append(SimpleNamespace(rows=Rows(first, skip)))
        token += length
    return batch, programs


@pytest.mark.parametrize("length", [1, 20])
def test_rows_come_in_the_one_form_kernels_are_compiled_for(length):
    batch = [Member(REQUEST, r, r * length, 30, 30 + length) for r in range(3)]
    rows = row_map(batch, [SimpleNamespace(rows=Rows())] * 3)
    assert all(array.flags.c_contiguous for array in rows.arrays)
    assert [str(array.dtype) for array in rows.arrays] == ["int64", *["int32"] * 4]


def is_calibrated(rows, position):
    return position >= rows.first and not any(s.start <= position < s.stop for s in rows.skip)


@given(batches())
def test_the_row_map_names_each_calibrated_row_once(case):
    batch, programs = case
    rows = row_map(batch, programs)
    found = [
        tuple(row)
        for row in np.stack(
            [x.numpy() for x in (rows.token, rows.request, rows.slot, rows.position)], 1
        ).tolist()
    ]
    assert found == [
        (member.token + position - member.start, member.row, slot, position)
        for slot, (member, program) in enumerate(zip(batch, programs, strict=True))
        for position in range(member.start, member.stop)
        if is_calibrated(program.rows, position)
    ]


@given(batches())
def test_tiles_are_runs_of_one_request(case):
    rows = row_map(*case)
    edges = rows.tiles.tolist()
    assert edges[0] == 0
    assert edges[-1] == len(rows.token)
    for begin, end in pairwise(edges):
        assert 0 < end - begin <= TILE
        assert len(set(rows.slot[begin:end].tolist())) == 1
        for field in (rows.position, rows.token):
            assert (np.diff(field[begin:end].numpy()) == 1).all()


@given(batches())
def test_tiles_are_no_more_than_needed(case):
    """A run that goes on is cut only where a tile is full."""
    rows = row_map(*case)
    edges = rows.tiles.tolist()
    for begin, cut in pairwise(edges[:-1]):
        same = rows.slot[cut - 1] == rows.slot[cut]
        if same and rows.position[cut] == rows.position[cut - 1] + 1:
            assert cut - begin == TILE


def test_types_of_the_row_map():
    rows = row_map([Member(REQUEST, 0, 0, 0, 3)], [SimpleNamespace(rows=Rows())])
    names = ("token", "request", "slot", "position", "tiles")
    types = [str(getattr(rows, name).dtype).removeprefix("torch.") for name in names]
    assert types == ["int64", "int32", "int32", "int32", "int32"]


def test_what_is_known_of_rows_moves_on_with_them(add):
    rows = row_map([Member(add("a", 20), 0, 0, 20, 21), Member(add("b", 9), 1, 1, 12, 13)])
    assert rows.last == 20
    rows.move_on(np.array([2, 0]))
    assert rows.last == 21
    assert rows.token.tolist() == [2, 0]
    assert rows.position.tolist() == [21, 13]
