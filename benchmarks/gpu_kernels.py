"""The GPU kernels by themselves: what a decoding step pays per layer beside stock attention.

python -m benchmarks.kernels --device cuda

Without vLLM's FlashAttention on the machine the stock column is empty. A batch whose cache does not
fit into free memory is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.figures import table
from server.kernels.partials import AttentionGeometry, Changes, PoolMap, RowMap, StridedCache

BLOCK = 16
BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (512, 2048, 8192, 32768)
QUANTILES = [0.5, 0.2, 0.8]


@dataclass(frozen=True, slots=True)
class Model:
    """Attention of one layer of a model."""

    query_heads: int
    kv_heads: int
    head_dim: int


MODELS: Mapping[str, Model] = {
    "Llama-3.1-8B": Model(32, 8, 128),
    "LLaVA-1.5-7B": Model(32, 32, 128),
}


@dataclass(frozen=True, slots=True)
class Step:
    """A decoding step: so many requests, a row each, with as many keys."""

    model: Model
    requests: int
    keys: int
    dtype: torch.dtype

    def cache_bytes(self) -> int:
        """Keys and values of the layer."""
        width = 2 * self.model.kv_heads * self.model.head_dim * self.dtype.itemsize
        return self.requests * self.keys * width

    def row_bytes(self) -> int:
        """One tensor of a row per request and query head."""
        return self.requests * self.model.query_heads * self.model.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call, and how near that is to moving its bytes at full bandwidth."""

    median: float
    low: float
    high: float
    bytes: int
    of_floor: float


@dataclass(frozen=True)
class Inputs:
    """What stock attention and the kernels take."""

    query: torch.Tensor
    output: torch.Tensor
    cache: StridedCache
    rows: RowMap
    pools: PoolMap
    heads: torch.Tensor
    geometry: AttentionGeometry


def inputs(step: Step, device: torch.device) -> Inputs:
    """Random tensors of a step; its pages lie in random order, heads of a token side by side."""
    torch.manual_seed(0)
    model, per_request = step.model, -(-step.keys // BLOCK)
    shape = step.requests * per_request, BLOCK, model.kv_heads, 2 * model.head_dim
    both = torch.empty(shape, dtype=step.dtype, device=device).normal_().transpose(1, 2)
    order = torch.randperm(shape[0], dtype=torch.int32).view(step.requests, per_request)
    keys, values = both.split(model.head_dim, -1)
    each = torch.arange(step.requests, dtype=torch.int32)
    query = torch.randn(step.requests, model.query_heads, model.head_dim).to(step.dtype)
    none = torch.empty(0)
    return Inputs(
        query.to(device),
        torch.randn_like(query).to(device),
        StridedCache(keys, values, order.to(device)),
        RowMap(
            each.long(), each, each, each * 0 + step.keys - 1, torch.arange(step.requests + 1).int()
        ),
        PoolMap(each * 0, torch.stack([each, each + 1], 1)),
        torch.ones(step.requests, model.query_heads, dtype=torch.bool, device=device),
        AttentionGeometry(model.head_dim**-0.5, 0.0, 0, none, none),
    )


def calls(step: Step, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """What is measured, and the bytes that each call cannot do without."""
    from server.kernels import gpu

    given, model = inputs(step, device), step.model
    slots = step.requests
    half = torch.full((slots, model.query_heads), 0.5, device=device)
    computed = torch.zeros(slots, dtype=torch.bool, device=device)
    changes = Changes(
        torch.zeros(slots, model.query_heads, dtype=torch.int32, device=device),
        torch.zeros(slots, model.query_heads, device=device),
        torch.zeros(slots, model.query_heads, device=device),
        torch.ones(slots, dtype=torch.bool, device=device),
    )

    def attention(stock: torch.Tensor | None = None) -> gpu.Attention:
        fields = given.query, given.cache, given.rows, given.heads, given.geometry
        return gpu.Attention(*fields, stock)

    known = attention().log_sum_exp.T.contiguous() * 0.6931471805599453
    found = attention().pool_partials(given.pools)
    rows, one_key = step.row_bytes(), step.cache_bytes() // step.keys
    partials = found.value.numel() * 4
    measured: dict[str, tuple[Callable[[], object], int]] = {
        "epilogue": (
            lambda: attention(known).rescale(given.output, given.pools, half, computed, changes),
            3 * rows + one_key,
        ),
        "rescale": (
            lambda: attention().rescale(given.output, given.pools, half, computed, changes),
            step.cache_bytes() + 2 * rows,
        ),
        "partials": (
            lambda: attention().pool_partials(given.pools),
            step.cache_bytes() + rows + partials,
        ),
        "combine": (
            lambda: gpu.combine(given.output, given.rows, given.heads, found, found.mass),
            partials + rows,
        ),
    }
    stock = stock_attention(given, step)
    return (
        measured if stock is None else {"stock": (stock, step.cache_bytes() + 2 * rows), **measured}
    )


def stock_attention(given: Inputs, step: Step) -> Callable[[], object] | None:
    """vLLM's FlashAttention on the same tensors; None where it is not installed."""
    try:
        flash = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    except ImportError:
        return None
    device = given.query.device
    starts = torch.arange(step.requests + 1, dtype=torch.int32, device=device)
    lengths = torch.full((step.requests,), step.keys, dtype=torch.int32, device=device)
    keys, values = given.cache.keys.transpose(1, 2), given.cache.values.transpose(1, 2)
    return lambda: flash(
        q=given.query,
        k=keys,
        v=values,
        out=given.output,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=step.keys,
        softmax_scale=given.geometry.scale,
        causal=True,
        block_table=given.cache.block_table,
    )


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy too large for any cache, both ways counted."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds: float = do_bench(lambda: target.copy_(source), quantiles=[0.5])
    return 2 * source.numel() / milliseconds * 1e3


def timing(call: Callable[[], object], moved: int, bytes_per_second: float) -> Timing:
    """Median with 20th and 80th percentile of one call, caches flushed before each."""
    from triton.testing import do_bench

    middle, low, high = (each * 1e3 for each in do_bench(call, quantiles=QUANTILES))
    return Timing(middle, low, high, moved, moved / bytes_per_second * 1e6 / middle)


def fits(step: Step, free: int) -> bool:
    """Whether a step's cache leaves room for all else."""
    return step.cache_bytes() * 1.5 < free


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table, and JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels --device cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("there is no GPU here, and nothing was measured\n")
        return 1
    device = torch.device("cuda")
    speed = bandwidth(device)
    facts = machine.facts() | {"gpu": torch.cuda.get_device_name(), "bytes_per_second": int(speed)}
    sys.stdout.write(f"{machine.sentence(facts)}\n\n")
    results = []
    for name in args.models:
        for requests in args.batches:
            for keys in args.contexts:
                step = Step(MODELS[name], requests, keys, torch.bfloat16)
                where = {"model": name, "requests": requests, "keys": keys}
                if not fits(step, torch.cuda.mem_get_info()[0]):
                    sys.stdout.write(f"left out, too large: {where}\n")
                    continue
                found = {what: timing(*each, speed) for what, each in calls(step, device).items()}
                results.append(where | {what: asdict(each) for what, each in found.items()})
                torch.cuda.empty_cache()
    sys.stdout.write(f"{table(*lines(results))}\n")
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "steps": results}, indent=1))
    return 0


def lines(results: Sequence[Mapping[str, object]]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows: microseconds with their percentiles, and the share of the floor."""
    columns = ("stock", "epilogue", "rescale", "partials", "combine")
    header = ["model", "requests", "keys", *(f"{column} us (of floor)" for column in columns)]
    rows = []
    for result in results:
        cells = [_cell(result.get(column)) for column in columns]
        rows.append([str(result[key]) for key in ("model", "requests", "keys")] + cells)
    return header, rows


def _cell(timed: object) -> str:
    if not isinstance(timed, dict):
        return "-"
    spread = f"{timed['median']:.1f} ({timed['low']:.1f}..{timed['high']:.1f})"
    return f"{spread} {timed['of_floor']:.0%}"
