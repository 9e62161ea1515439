"""vLLM's real scheduler, driven step by step without a model."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from zlib import crc32

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from calibrators.interface import Prefill
from server.engine.arriving import ATTRIBUTE
from server.engine.payload import KEY, Payload
from server.engine.scheduler import make_scheduler

BLOCK = 16
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 5000,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}


@dataclass
class Driver:
    """A scheduler, and what it did.

    Attributes:
        chunks: per request, (step, first position, tokens) of each chunk.
        finished: step in which a request's last output came.
        reasons: why it ended.
        late: steps whose output is still to come, where scheduling runs ahead.
        reports: of the worker, on the outputs of steps from now on.
        heard: what rode on the outputs of a step, by request.
    """

    scheduler: Scheduler
    ahead: int = 0
    chunks: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    now: int = 0
    late: list = field(default_factory=list)
    reports: object = None
    heard: list[dict[str, dict]] = field(default_factory=list)

    def add(
        self,
        name,
        length,
        policy=None,
        *,
        tokens=4,
        seed=None,
        shareable=False,
        stop=None,
        **fields,
    ):
        """Queue a request; `policy` None is a plain one."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, stop=stop)
        if policy is not None:
            sharing = policy is Prefill.ANY or shareable
            payload = Payload(name, (), policy, sharing)
            params.extra_args = {KEY: payload.to_extra_args()}
        start = 1 + (crc32(name.encode()) if seed is None else seed) % 4000
        prompt = [start + i % 999 for i in range(length)]
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(
            Request(name, prompt, params, None, block_hasher=hasher, **fields)
        )

    def step(self, **options):
        """One step; every request that is through its tokens samples one more."""
        output = self.scheduler.schedule(**options)
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, size in output.num_scheduled_tokens.items():
            self.chunks[name].append((self.now, starts[name], size))
        names = list(output.num_scheduled_tokens)
        sampling = [not self.scheduler.requests[name].is_prefill_chunk for name in names]
        self.late.append((output, names, sampling))
        self.now += 1
        if len(self.late) > self.ahead:
            self._receive(*self.late.pop(0))
        return output

    def _receive(self, output, names, sampling):
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[7] if samples else [] for samples in sampling],
        )
        if self.reports is not None:
            setattr(result, ATTRIBUTE, self.reports)
        self.heard.append({})
        for batch in self.scheduler.update_from_output(output, result).values():
            for each in batch.outputs:
                self.heard[-1][each.request_id] = (each.kv_transfer_params or {}).get(KEY)
                if each.finish_reason is not None:
                    self.finished[each.request_id] = self.now
                    self.reasons[each.request_id] = str(each.finish_reason)

    def run(self, steps=1000):
        """Steps until nothing is left, `steps` at most."""
        for _ in range(steps):
            if not self.scheduler.has_requests():
                return
            self.step()

    def steps_of(self, name):
        """Steps in which a request was scheduled."""
        return [step for step, _, _ in self.chunks[name]]


def make_config(folder, *, budget=64, blocks=200, slots=8, async_scheduling=False, **scheduling):
    """Configuration of a toy model."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    config = VllmConfig(
        model_config=ModelConfig(
            str(folder), tokenizer=str(folder), skip_tokenizer_init=True, max_model_len=1024
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=budget,
            max_model_len=1024,
            is_encoder_decoder=False,
            **scheduling,
        ),
    )
    # The CPU platform turns it off, whatever was asked for.
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.num_gpu_blocks = blocks
    return config


def make_driver(config, make=make_scheduler):
    """A driver of the scheduler that `make` returns."""
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    blocks = config.cache_config.num_gpu_blocks
    scheduler = make(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )
    return Driver(scheduler, ahead=int(config.scheduler_config.async_scheduling))
