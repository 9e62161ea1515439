"""Formulas compiled from what torch was seen to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from server.kernels.cpu_formula import compiled
from server.kernels.cpu_formula_loops import Unknown

HEADS, COLUMNS = 5, 3
TABLES = (torch.bool, torch.float32)


def compile_here(formula):
    return compiled(formula, HEADS, COLUMNS, TABLES)


def everything(mass, chosen, factor):
    """What the source knows, in one formula."""
    a, b, rest = mass.unbind(-1)
    low = (a <= b) | (a.eq(0.5) & ~(b >= rest))
    order = (a * factor).sort(dim=-1, descending=True, stable=True)
    upper = torch.zeros_like(low).scatter_(1, order.indices[:, :2], True) & (b != rest)
    total = torch.where(upper, a, 0.0).sum(-1, keepdim=True)
    highest = (1 - mass[..., 1]).amax(-1, keepdim=True)
    ratio = torch.where(total > 0, 1 / total, highest).expand_as(a)
    pairs = torch.stack([a, b], -1) / (rest + 1)[..., None] - mass[..., 1:]
    joined = torch.cat([pairs, torch.ones_like(pairs), ratio[..., None]], -1)
    return (
        chosen & low,
        upper,
        joined,
        ratio < factor,
        torch.ones_like(low),
        chosen.float().sum(-1, keepdim=True),
        order.values,
    )


def fill(function, mass, slot, tables, expected):
    found = [torch.full_like(each, 7).contiguous() for each in expected]
    arrays = [each.numpy() for each in (mass, slot, *tables, *found)]
    function(*arrays)
    return found


def masses(rows, seed):
    return torch.randn(rows, HEADS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def function():
    return compile_here(everything)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("kind", ["random", "ties", "zero", "strange"])
def test_it_gives_what_torch_gives(function, rows, kind):
    mass = masses(rows, rows)
    if kind == "ties":
        mass = mass.round()
    elif kind == "zero":
        mass = torch.zeros_like(mass)
    elif kind == "strange":
        numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0])
        mass = numbers[torch.randint(5, mass.shape, generator=torch.Generator().manual_seed(rows))]
    slot = torch.arange(rows, dtype=torch.int32).flip(0)
    chosen, factor = masses(rows, 1)[..., 0] > 0, masses(rows, 2)[..., 0]
    expected = everything(mass, chosen[slot.long()], factor[slot.long()])
    found = fill(function, mass, slot, (chosen, factor), expected)
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_numbers_of_a_head_are_the_same_to_the_bit():
    def formula(mass, chosen, factor):
        seen = mass[..., 0] + mass[..., 1]
        return (torch.where(chosen, factor * (seen - mass[..., 2]) / seen, 1 - factor),)

    mass, slot = masses(64, 3), torch.arange(64, dtype=torch.int32)
    tables = masses(64, 1)[..., 0] > 0, masses(64, 2)[..., 0]
    expected = formula(mass, *tables)
    found = fill(compile_here(formula), mass, slot, tables, expected)
    assert torch.equal(found[0], expected[0])


def by_value(mass, chosen, factor):
    return (mass[..., 0] if (factor > 0).any() else factor,)


def across_rows(mass, chosen, factor):
    return (mass[..., 0] - mass[..., 0].sum(0, keepdim=True),)


def by_number_of_rows(mass, chosen, factor):
    return (factor / factor.shape[0],)


def in_place(mass, chosen, factor):
    other = factor + 1
    doubled = other.mul_(2)
    return doubled, other


def constant(mass, chosen, factor):
    return (factor * torch.arange(HEADS),)


def without_axis(mass, chosen, factor):
    return (factor - factor.sum(-1)[:, None],)


def rounded(mass, chosen, factor):
    return (torch.div(factor, 2, rounding_mode="floor"),)


def in_double(mass, chosen, factor):
    return (factor.double(),)


def unknown(mass, chosen, factor):
    return (factor.erfinv(),)


def seen_before_it_changes(mass, chosen, factor):
    start = torch.zeros_like(chosen)
    order = factor.sort(dim=-1, descending=True, stable=True).indices
    before = start | chosen
    return before, start.scatter_(1, order[:, :1], True)


@pytest.mark.parametrize(
    "formula",
    [
        across_rows,
        by_number_of_rows,
        in_place,
        constant,
        without_axis,
        rounded,
        in_double,
        unknown,
        seen_before_it_changes,
    ],
)
def test_what_has_no_compiled_form(formula):
    with pytest.raises(Unknown):
        compile_here(formula)


def test_what_decides_by_values_cannot_be_traced():
    with pytest.raises(RuntimeError, match="data-dependent"):
        compile_here(by_value)


def test_threads_that_trace_at_once_leave_torch_as_it_was():
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(compile_here, [everything] * 4))
    assert len(made) == 4
    assert not is_fx_symbolic_tracing()


def test_rows_without_anything_are_none(function):
    expected = everything(
        masses(0, 0), torch.ones(0, HEADS, dtype=torch.bool), torch.ones(0, HEADS)
    )
    slot = torch.from_numpy(np.empty(0, np.int32))
    tables = torch.ones(1, HEADS, dtype=torch.bool), torch.ones(1, HEADS)
    assert all(len(each) == 0 for each in fill(function, masses(0, 0), slot, tables, expected))
