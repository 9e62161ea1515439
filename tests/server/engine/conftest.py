"""Factories for the worker's side: request tables, payloads and steps over a toy paged cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from calibrators import registry
from calibrators.interface import Bound, Prompt
from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings
from server.engine.payload import Payload
from server.engine.programs import HeadShard
from server.engine.requests import RequestTable


@pytest.fixture
def facts(make_facts):
    return make_facts(layers=3)


@pytest.fixture
def extra_args(facts):
    """Sampling arguments of a request that asks for ZeroTuning, or for given calibrations."""

    def make(*bounds, ticket="ticket", **settings):
        if not bounds:
            model = ZeroTuningSettings.model_validate({"gamma": 0.5} | settings)
            bounds = (ZeroTuning().bind(model, facts),)
        return {"trimtab": Payload(ticket, bounds).to_extra_args()}

    return make


@pytest.fixture
def make_table(facts):
    """A request table; further calibrators by argument."""

    def make(*more, shard=None):
        offer = registry.load()
        for calibrator in more:
            offer.register(calibrator)
        return RequestTable(offer, facts, shard or HeadShard(0, facts.query_heads))

    return make


@pytest.fixture
def table(make_table):
    return make_table()


@pytest.fixture
def add(table, extra_args):
    """Add a request to `table`; gives its state."""

    def make(request_id, length, cached=0, plain=False, **settings):
        arguments = None if plain else extra_args(ticket=f"t-{request_id}", **settings)
        table.add(request_id, arguments, Prompt(length), cached)
        return table.get(request_id)

    return make


@pytest.fixture
def bound():
    return Bound("zerotuning", {"gamma": 0.5, "layers": "all", "heads": {"1": [2]}}, 1, 1, "name")


@pytest.fixture
def make_output():
    """An engine output with what rides on it."""

    def make(request_id, params=None):
        return SimpleNamespace(request_id=request_id, kv_transfer_params=params)

    return make
