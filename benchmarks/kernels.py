"""The kernels by themselves: microseconds per layer, no engine.

python -m benchmarks.kernels
python -m benchmarks.kernels --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks import gpu_kernels, machine
from benchmarks.figures import table
from server.kernels import cpu
from server.kernels.partials import (
    TILE,
    AttentionGeometry,
    Changes,
    PagedCache,
    PoolMap,
    RowMap,
)

BLOCK = 128
QUERY_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of equal requests.

    Attributes:
        requests: in the batch.
        keys: each row's request has, after this step.
        rows: of each request in this step, its last ones.
    """

    requests: int
    keys: int
    rows: int


CASES: Mapping[str, Case] = {
    "decode 1 x 264": Case(1, 264, 1),
    "decode 16 x 264": Case(16, 264, 1),
    "decode 16 x 1532": Case(16, 1532, 1),
    "prefill 10 x 200": Case(10, 200, 200),
    "prefill 1 x 1500": Case(1, 1500, 1500),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the kernels take, for one layer and one pool that holds key 0."""

    query: torch.Tensor
    output: torch.Tensor
    cache: PagedCache
    rows: RowMap
    pools: PoolMap
    heads: torch.Tensor
    geometry: AttentionGeometry


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args, others = parser.parse_known_args(argv)
    if args.device == "cuda":
        return gpu_kernels.main(others)
    if others:
        parser.error(f"unknown: {' '.join(others)}")
    header = (
        "case",
        "threads",
        "log-sum-exp us",
        "rescale us",
        "partials us",
        "combine us",
        "Gflop/s",
    )
    lines = []
    for threads in args.threads:
        cpu.set_threads(threads)
        torch.set_num_threads(threads)
        for name, case in CASES.items():
            lines.append(
                (name, str(threads), *_line(case, getattr(torch, args.dtype), args.repeat))
            )
    sys.stdout.write(f"{machine.sentence(machine.facts())}\n")
    sys.stdout.write(
        f"{args.dtype}, {QUERY_HEADS} query heads, {KV_HEADS} KV heads of {HEAD_DIM}\n\n"
    )
    sys.stdout.write(f"{table(header, lines)}\n")
    return 0


def _line(case: Case, dtype: torch.dtype, repeat: int) -> tuple[str, ...]:
    given = inputs(case, dtype)
    rows = given.rows.token.shape[0]
    every = torch.ones(rows, QUERY_HEADS, dtype=torch.bool)
    half = torch.full((case.requests, QUERY_HEADS), 0.5)
    changes = Changes.none(rows, QUERY_HEADS)
    computed = torch.ones(case.requests, dtype=torch.bool)

    def attention() -> cpu.Attention:
        return cpu.Attention(given.query, given.cache, given.rows, given.heads, given.geometry)

    known = attention()
    found = known.pool_partials(given.pools)
    calls: tuple[Callable[[], object], ...] = (
        lambda: attention().log_sum_exp,
        lambda: known.rescale(given.output, given.pools, half, computed, changes),
        lambda: known.pool_partials(given.pools),
        lambda: cpu.combine(given.output, given.rows, every, found, found.mass),
    )
    seconds = [_median_seconds(call, repeat) for call in calls]
    return (*(f"{each * 1e6:.0f}" for each in seconds), f"{flops(case) / seconds[0] / 1e9:.0f}")


def flops(case: Case) -> float:
    """Multiplications and additions of the logits of all rows and query heads."""
    visible = sum(range(case.keys - case.rows + 1, case.keys + 1))
    return 2.0 * case.requests * visible * QUERY_HEADS * HEAD_DIM


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Random tensors of a case; its pages lie in random order."""
    torch.manual_seed(0)
    per_request = -(-case.keys // BLOCK)
    pages = torch.randn(case.requests * per_request, KV_HEADS, 2, HEAD_DIM * BLOCK).to(dtype)
    order = torch.randperm(case.requests * per_request, dtype=torch.int32)
    count = case.requests * case.rows
    each = torch.arange(case.requests, dtype=torch.int32).repeat_interleave(case.rows)
    last = torch.arange(case.keys - case.rows, case.keys, dtype=torch.int32)
    query = torch.randn(count, QUERY_HEADS, HEAD_DIM).to(dtype)
    none = torch.empty(0)
    return Inputs(
        query,
        torch.randn_like(query),
        PagedCache(pages, order.view(case.requests, per_request)),
        RowMap(torch.arange(count), each, each, last.repeat(case.requests), _tiles(case)),
        PoolMap(
            torch.zeros(case.requests, dtype=torch.int32),
            torch.arange(case.requests + 1, dtype=torch.int32).unfold(0, 2, 1).contiguous(),
        ),
        torch.ones(case.requests, QUERY_HEADS, dtype=torch.bool),
        AttentionGeometry(HEAD_DIM**-0.5, 0.0, 0, none, none),
    )


def _tiles(case: Case) -> torch.Tensor:
    edges = [
        request * case.rows + begin
        for request in range(case.requests)
        for begin in range(0, case.rows, TILE)
    ]
    return torch.tensor([*edges, case.requests * case.rows], dtype=torch.int32)


def _median_seconds(call: Callable[[], object], repeat: int) -> float:
    taken = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
