"""Coefficients compiled for the CPU, beside those that torch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrators import registry
from calibrators.zerotuning import ZeroTuning
from server.engine.answers import traced
from server.engine.coefficients import as_masses, asked
from server.engine.rewrites import prepare

HEADS = 6
OFFER = registry.load()
# Columns of a pool with weights come twice.
COLUMNS = {"zerotuning": 2, "act": 2, "var": 4, "gift": 5}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_method_that_recombines_is_compiled(name):
    assert traced(type(OFFER[name]), HEADS, COLUMNS[name]) is not None


def row_masses(draw, columns):
    """Masses as kernels give them, in all shapes that rows come in."""
    share = draw(st.sampled_from([0.0, 1e-38, 1e-7, 0.3, 0.5, 1.0]))
    split = draw(st.lists(st.floats(0, 1, width=32), min_size=columns, max_size=columns))
    values = np.array(split, np.float32)
    values[:-1] *= np.float32(share)
    total = values.sum()
    return values / total if total > 0 else values


@st.composite
def problems(draw, name):
    columns = COLUMNS[name]
    rows = draw(st.integers(1, 4))
    mass = np.array([[row_masses(draw, columns) for _ in range(HEADS)] for _ in range(rows)])
    if draw(st.booleans()):
        mass[draw(st.integers(0, rows - 1)), draw(st.integers(0, HEADS - 1))] = np.nan
    numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
    parameters = [
        torch.tensor(draw(st.lists(numbers, min_size=HEADS, max_size=HEADS))).expand(rows, -1)
        for _ in OFFER[name].parameters
    ]
    heads = torch.tensor(draw(st.lists(st.booleans(), min_size=HEADS, max_size=HEADS)))
    return torch.from_numpy(mass.astype(np.float32)), heads.expand(rows, -1), parameters


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_compiled_coefficients_are_those_of_torch(name, data):
    mass, heads, parameters = data.draw(problems(name))
    calibrator = OFFER[name]
    named = dict(zip(calibrator.parameters, parameters, strict=True))
    expected = asked(calibrator, as_masses(mass, len(calibrator.pools)), named, heads)
    found = traced(type(calibrator), HEADS, mass.shape[2])
    touched, factors = torch.empty_like(expected.touched), torch.empty_like(expected.factors)
    sums = np.empty((2 + len(found.statistics), len(mass), 1), np.float32)
    slot = np.arange(len(mass), dtype=np.int32)
    tables = [heads.contiguous(), *(each.contiguous() for each in parameters)]
    outputs = touched.numpy(), factors.numpy(), *sums
    found.compiled(mass.numpy(), slot, *(table.numpy() for table in tables), *outputs)
    assert torch.equal(touched, expected.touched)
    torch.testing.assert_close(factors, expected.factors, equal_nan=True)
    assert sums[0, :, 0].tolist() == expected.touched.sum(1).tolist()
    assert sums[1, :, 0].tolist() == expected.counted.sum(1).tolist()
    assert found.statistics == tuple(expected.statistics)
    for total, values in zip(sums[2:, :, 0], expected.statistics.values(), strict=True):
        wanted = torch.where(expected.counted, values, 0).sum(1)
        torch.testing.assert_close(torch.from_numpy(total), wanted, equal_nan=True)


class Raising(ZeroTuning):
    def coefficients(self, masses, parameters):
        raise RuntimeError("on purpose")


class Deciding(ZeroTuning):
    def coefficients(self, masses, parameters):
        if (masses.plain > 2).any():
            raise RuntimeError("never")
        return super().coefficients(masses, parameters)


class Odd(ZeroTuning):
    def coefficients(self, masses, parameters):
        return super().coefficients(masses, {"gamma": parameters["gamma"].exp().log()})


@pytest.mark.parametrize("method", [Raising, Deciding, Odd])
def test_torch_computes_the_others(method):
    assert traced(method, HEADS, 2) is None


def test_methods_are_compiled_once_for_the_columns_that_they_will_get():
    traced.cache_clear()
    prepare([*OFFER.values()], HEADS)
    compiled = traced.cache_info().misses
    for name in ("act", "var", "gift"):
        assert traced(type(OFFER[name]), HEADS, COLUMNS[name]) is not None
    # The others have no pools, or a kernel of their own.
    assert traced.cache_info().misses == compiled == 3
