"""What calibrators may know, read from vLLM's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.interface import ModelFacts
from calibrators.registry import BUILT_IN
from server.engine.payload import KEY
from server.fingerprint import fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class StepLimit:
    """The most tokens of one prompt that a step takes, and the flag that says so."""

    tokens: int
    flag: str


def step_limit(vllm_config: VllmConfig) -> StepLimit:
    """What bounds a prompt that has to be prefilled in one step."""
    scheduler = vllm_config.scheduler_config
    limits = {
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--max-num-scheduled-tokens": scheduler.max_num_scheduled_tokens,
        "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold,
    }
    # None and 0 stand for no limit.
    return min(
        (StepLimit(tokens, flag) for flag, tokens in limits.items() if tokens),
        key=lambda limit: limit.tokens,
    )


def model_facts(vllm_config: VllmConfig) -> ModelFacts:
    """Facts of the served model, over all ranks."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    return ModelFacts(
        architecture=model.architecture,
        layers=text.num_hidden_layers,
        query_heads=model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        max_model_len=model.max_model_len,
        modality="vision" if model.is_multimodal_model else "text",
        config_hash=fingerprint(model.hf_config, text),
    )


def model_identity(vllm_config: VllmConfig) -> str:
    """The served model in digests: by its name, which is the same wherever its files lie."""
    model = vllm_config.model_config
    name = model.served_model_name
    return f"{name if isinstance(name, str) else name[0]}@{model.revision or ''}"


def counts_for_all(vllm_config: VllmConfig) -> bool:
    """Whether this API server counts, once, what all of them do alike at their start."""
    rank: int = vllm_config.parallel_config._api_process_rank
    return rank <= 0


def calibrators_of(vllm_config: VllmConfig) -> tuple[str, ...]:
    """Names of the calibrators this engine offers."""
    config = vllm_config.additional_config
    entry = config.get(KEY, {}) if isinstance(config, dict) else {}
    return tuple(entry.get("calibrators", BUILT_IN))
