"""Two ranks with half of the heads each, against one with all of them."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibrators.interface import Prompt
from server.engine.batch import members
from server.engine.programs import HeadShard
from server.engine.ranks import Share, across, alone, heads_across, united
from server.engine.step import Planner
from server.kernels.partials import PagedCache
from tests.server.kernels.paging import problem

LENGTHS, SPANS = [40, 25], [40, 3]
HALVES = [HeadShard(0, 3), HeadShard(3, 6)]


@pytest.fixture
def make_rank(make_table, extra_args):
    """A rank's plan of one step, already applied, and the state behind it."""

    def make(shard, settings):
        table = make_table(shard=shard)
        for name, setting, length in zip("ab", settings, (40, 23), strict=True):
            table.add(name, extra_args(**setting), Prompt(length), 0)
        case = problem(LENGTHS, SPANS)
        heads, kv = slice(shard.start, shard.stop), slice(shard.start // 3, shard.stop // 3)
        cache = PagedCache(case.cache.pages[:, kv].contiguous(), case.cache.block_table)
        query = case.query[:, heads].contiguous()
        plan = Planner().plan(members(table, "ab", [0, *np.cumsum(SPANS).tolist()], LENGTHS))
        for layer in range(3):
            plan.apply(layer, query, torch.randn_like(query), cache, case.geometry)
        return plan, table

    return make


def tallies(table):
    return [table.get(name).programs[0].tally for name in "ab"]


@pytest.mark.parametrize(
    "settings",
    [
        ({"gamma": 0.3}, {"gamma": 5}),
        ({"gamma": 0.3, "heads": [1]}, {"gamma": 5, "heads": [4, 5]}),
        ({"gamma": 0.3, "heads": [3], "layers": [2]}, {"gamma": 5, "heads": [5]}),
        ({"gamma": 2, "heads": {"0": [0], "2": [5]}}, {"gamma": 5, "layers": [1]}),
    ],
    ids=str,
)
def test_ranks_tally_together_what_one_alone_would(make_rank, settings):
    whole, expected = make_rank(HeadShard(0, 6), settings)
    whole.finish()
    first, table = make_rank(HALVES[0], settings)
    second, _ = make_rank(HALVES[1], settings)
    sent = []
    second.finish(lambda shares: sent.append(shares) or shares)
    first.finish(lambda shares: united([shares, *sent]))
    for got, want in zip(tallies(table), tallies(expected), strict=True):
        assert (got.prompt_tokens, got.completion_tokens, got.count) == (
            want.prompt_tokens,
            want.completion_tokens,
            want.count,
        )
        assert got.sums == pytest.approx(want.sums, rel=1e-5)
    assert not any(table.get(name).failed for name in "ab")


def share(done, finite=(True, True, True), count=(1.0, 0.0), **sums):
    return Share(
        np.array(done, np.bool_),
        np.array(finite, np.bool_),
        np.array(count),
        {name: np.array(values) for name, values in sums.items()},
    )


def test_a_row_counts_once_whichever_ranks_calibrated_it():
    parts = [share([1, 0, 1], mean=[0.5, 1]), share([1, 1, 0], count=(2.0, 3.0), mean=[1, 2])]
    merged = united([{"m": part} for part in parts])["m"]
    assert merged.done.tolist() == [True, True, True]
    assert merged.count.tolist() == [3, 3]
    assert merged.sums["mean"].tolist() == [1.5, 3]


@pytest.mark.parametrize("order", [1, -1])
def test_a_rank_that_calibrated_nothing_has_no_statistics(order):
    idle, busy = share([0, 0, 0], count=(0.0, 0.0)), share([1, 1, 0], mean=[1, 2])
    merged = united([{"m": part} for part in (idle, busy)[::order]])["m"]
    assert merged.sums["mean"].tolist() == [1, 2]


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_fails_if_it_fails_anywhere(order):
    sound, broken = share([1, 1, 1]), share([1, 1, 1], finite=[True, False, True])
    merged = united([{"m": part} for part in (sound, broken)[::order]])["m"]
    assert merged.finite.tolist() == [True, False, True]


@pytest.mark.parametrize("other", [{}, {"m": share([1, 1], [True, True], (1.0,))}], ids=len)
def test_ranks_that_disagree_on_who_takes_part_fail_them_all(other):
    merged = united([{"m": share([1, 1, 1])}, other])["m"]
    assert not merged.finite.any()


def test_a_failed_row_of_another_rank_fails_its_request(make_rank):
    settings = ({"gamma": 0.3}, {"gamma": 5})
    plan, table = make_rank(HALVES[0], settings)
    other = share([0] * 43, [True] * 40 + [True, False, True], (0.0, 0.0))
    plan.finish(lambda shares: united([shares, {"zerotuning": other}]))
    assert [table.get(name).failed for name in "ab"] == [False, True]


def test_one_rank_needs_no_union():
    assert across(SimpleNamespace(world_size=1)) is alone


class Group:
    """vLLM's group of two ranks, seen from one; the other's message is known beforehand."""

    world_size = 2
    device = torch.device("cpu")

    def __init__(self, rank, other):
        self.rank, self.other = rank, pickle.dumps(other)

    def all_gather(self, tensor, dim):
        return torch.cat([tensor, torch.tensor([float(len(self.other))])])

    def gather(self, tensor, dst, dim):
        other = bytearray(self.other.ljust(4 * len(tensor), b"\0"))
        both = torch.cat([tensor, torch.frombuffer(other, dtype=torch.float32)], dim)
        return both if dst == self.rank else None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sums", [{}, {"a statistic of some name": [1, 2]}], ids=len)
def test_shares_go_to_the_rank_whose_output_is_used(rank, sums):
    union = across(Group(rank, {"m": share([0, 1, 0], **sums)}))
    merged = union({"m": share([1, 0, 0], mean=[3, 4])})["m"]
    assert merged.done.tolist() == [True, rank == 0, False]
    assert merged.sums["mean"].tolist() == [3, 4]
    assert set(merged.sums) == {"mean", *(sums if rank == 0 else ())}


class GPUs:
    """vLLM's group of two ranks whose layers are on GPUs: its collectives take no host tensors."""

    world_size = 2
    device = torch.device("meta")

    def __init__(self, rank):
        self.rank_in_group, self.cpu_group = rank, torch.distributed.group.WORLD

    def all_gather(self, tensor, dim):
        assert tensor.device == self.device
        return torch.cat([tensor, tensor], dim)

    def gather(self, tensor, dst, dim):
        raise AssertionError("a message is on the host")


def on_two_gpus(rank, folder):
    """What a rank gets, written to a file; the other runs beside it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    group = GPUs(rank)
    gather, union = heads_across(group), across(group)
    values = torch.arange(6.0).view(3, 2, 1) + 10 * rank
    # The second rank's message is the longer one.
    own = share([1 - rank, 0, rank], **({"a statistic of some name": [1, 2]} if rank else {}))
    merged = union({"m": own})["m"]
    found = {
        "host": gather(values).tolist(),
        "device": list(gather(values.to("meta")).shape),
        "nothing": list(gather(torch.empty(0, 2, 1)).shape),
        "done": merged.done.tolist(),
        "sums": sorted(merged.sums),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_ranks_on_gpus_bring_together_what_is_on_the_host_and_what_is_not(tmp_path):
    torch.multiprocessing.spawn(on_two_gpus, (tmp_path,), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, each in enumerate(found):
        assert each["host"] == [[[a], [a + 1], [a + 10], [a + 11]] for a in (0.0, 2.0, 4.0)]
        assert (each["device"], each["nothing"]) == ([3, 4, 1], [0, 4, 1])
        # The shares of all are on the rank whose output is used, and its own on the other.
        assert each["done"] == ([True, False, True] if rank == 0 else [False, False, True])
        assert each["sums"] == ["a statistic of some name"]
