"""What calibration costs of a decoding step on a GPU, beside what it may cost.

python -m benchmarks.gpu_figures

A step is what a model cannot do without: the products of its layers and of its head with random
weights, and stock attention. Without vLLM's FlashAttention on the machine, attention counts as its
keys and values at full bandwidth. Such a step is quicker than a real one, so that shares come out
too large and never too small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.figures import table
from benchmarks.gpu_kernels import MODELS, Inputs, Model, Step, bandwidth, inputs, stock_attention
from calibrators import registry
from calibrators.interface import ModelFacts
from server.engine.rewrites import rewrite
from server.engine.stack import Stack
from server.kernels.partials import PoolMap, PoolTable

REQUESTS, KEYS, IMAGE_TOKENS = 64, 2048, 576
# By method: the most it may take of a step.
ALLOWED: Mapping[str, float] = {"zerotuning": 0.02, "var": 0.05, "gift": 0.05, "vhr": 0.005}
# What has no default.
SETTINGS: Mapping[str, Mapping[str, object]] = {"zerotuning": {"gamma": 0.5}}
# Image tokens that are sinks, and tokens of a question.
SINKS, QUESTION = 8, 32


@dataclass(frozen=True, slots=True)
class Network:
    """A model around its attention."""

    attention: Model
    hidden: int
    inner: int
    layers: int
    vocabulary: int
    architecture: str

    def facts(self) -> ModelFacts:
        """What methods take their defaults from."""
        return ModelFacts(
            architecture=self.architecture,
            layers=self.layers,
            query_heads=self.attention.query_heads,
            kv_heads=self.attention.kv_heads,
            head_dim=self.attention.head_dim,
            hidden_size=self.hidden,
            max_model_len=4096,
            modality="text" if self.architecture.startswith("Llama") else "vision",
        )

    def products(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the products of a layer."""
        one = self.attention
        heads, dim = one.query_heads + 2 * one.kv_heads, one.head_dim
        return (
            (self.hidden, heads * dim),
            (one.query_heads * dim, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        )


NETWORKS: Mapping[str, Network] = {
    "Llama-3.1-8B": Network(MODELS["Llama-3.1-8B"], 4096, 14336, 32, 128256, "LlamaForCausalLM"),
    "LLaVA-1.5-7B": Network(
        MODELS["LLaVA-1.5-7B"], 4096, 11008, 32, 32064, "LlavaForConditionalGeneration"
    ),
}
MODEL_OF: Mapping[str, str] = {
    name: "Llama-3.1-8B" if name == "zerotuning" else "LLaVA-1.5-7B" for name in ALLOWED
}


@dataclass(frozen=True, slots=True)
class Share:
    """What a method takes of a step; microseconds."""

    method: str
    model: str
    layers: int
    layer: float
    step: float

    @property
    def of_step(self) -> float:
        """All its layers over the whole step."""
        return self.layers * self.layer / self.step


def pools_of(method: str, requests: int, query_heads: int) -> PoolMap | PoolTable:
    """What a method measures in a row, of prompts that begin with an image."""
    sinks, image = [*range(SINKS)], [*range(SINKS, IMAGE_TOKENS)]
    question = [*range(IMAGE_TOKENS + 1, IMAGE_TOKENS + 1 + QUESTION)]
    lists: Mapping[str, list[list[int]]] = {
        "zerotuning": [[0]],
        "var": [sinks, [IMAGE_TOKENS], image],
        "gift": [sinks + image, question],
        "vhr": [],
    }
    ends = torch.tensor([0, *map(len, lists[method])]).cumsum(0)
    keys = torch.tensor([key for pool in lists[method] for key in pool], dtype=torch.int32)
    offsets = torch.stack([ends + slot * len(keys) for slot in range(requests)]).int()
    pools = PoolMap(keys.repeat(requests), offsets)
    if method == "zerotuning":
        return pools
    made = PoolTable.of(pools, query_heads)
    weights = torch.rand(len(keys) * requests) if method == "gift" else None
    return PoolTable(made.listed, made.spans, made.above, made.sets, made.prompts, weights)


def layer_of(method: str, step: Step, given: Inputs, known: torch.Tensor) -> Callable[[], None]:
    """One layer of a step in which every request has this calibration, as the engine does it."""
    from server.kernels import gpu

    device, shape = given.query.device, (step.requests, step.model.query_heads)
    calibrator = registry.load((method,))[method]
    pools = pools_of(method, *shape)
    parameters = {name: [torch.full(shape, 0.5, device=device)] for name in calibrator.parameters}
    maps = [pools] if isinstance(pools, PoolMap) else None
    # Programs are only counted where tables are made already.
    programs: list[object] = [None] * step.requests
    stack = Stack(programs, [given.heads], parameters, [pools], maps, {0}, device)
    act = rewrite(calibrator, stack, given.rows, frozenset())

    def layer() -> None:
        fields = given.query, given.cache, given.rows, given.heads, given.geometry
        act.apply(0, partial(gpu.Attention, *fields, known), given.output)

    return layer


def microseconds(call: Callable[[], object]) -> float:
    """Median of one call, caches flushed before each."""
    from triton.testing import do_bench

    middle: float = do_bench(call, quantiles=[0.5])
    return middle * 1e3


def step_time(network: Network, step: Step, given: Inputs, bytes_per_second: float) -> float:
    """What the model itself takes for a step."""

    def products(*sizes: tuple[int, int]) -> float:
        options = {"dtype": step.dtype, "device": given.query.device, "bias": False}
        maps = [nn.Linear(*size, **options).requires_grad_(False) for size in sizes]
        rows = [given.query.new_ones(step.requests, size[0]) for size in sizes]
        return microseconds(lambda: [each(x) for each, x in zip(maps, rows, strict=True)])

    stock = stock_attention(given, step)
    floor = step.cache_bytes() / bytes_per_second * 1e6
    attention = floor if stock is None else microseconds(stock)
    head = products((network.hidden, network.vocabulary))
    return network.layers * (products(*network.products()) + attention) + head


def shares(device: torch.device, methods: Sequence[str] = tuple(ALLOWED)) -> Iterator[Share]:
    """What each method takes of a step of the model it is promised for."""
    from server.kernels import gpu

    speed = bandwidth(device)
    for method in methods:
        network = NETWORKS[MODEL_OF[method]]
        step = Step(network.attention, REQUESTS, KEYS, torch.bfloat16)
        given = inputs(step, device)
        fields = given.query, given.cache, given.rows, given.heads, given.geometry
        known = gpu.Attention(*fields).log_sum_exp.T.contiguous() * 0.6931471805599453
        taken = microseconds(layer_of(method, step, given, known))
        whole = step_time(network, step, given, speed)
        yield Share(method, MODEL_OF[method], layers_of(method, network), taken, whole)


def layers_of(method: str, network: Network) -> int:
    """Layers in which a method acts by default."""
    calibrator = registry.load((method,))[method]
    settings = calibrator.Settings.model_validate(SETTINGS.get(method, {}))
    return calibrator.bind(settings, network.facts()).layers


def main() -> int:
    """Measure and print; exit status 1 where a method takes more than it may."""
    if not torch.cuda.is_available():
        sys.stderr.write("there is no GPU here, and nothing was measured\n")
        return 1
    found = [*shares(torch.device("cuda"))]
    header = ("method", "model", "layers", "us of a layer", "us of a step", "share", "allowed")
    lines = [
        (
            each.method,
            each.model,
            str(each.layers),
            f"{each.layer:.1f}",
            f"{each.step:.0f}",
            f"{each.of_step:.2%}",
            f"{ALLOWED[each.method]:.1%}",
        )
        for each in found
    ]
    sys.stdout.write(f"{torch.cuda.get_device_name()}\n\n{table(header, lines)}\n")
    return int(any(each.of_step > ALLOWED[each.method] for each in found))


if __name__ == "__main__":
    sys.exit(main())
