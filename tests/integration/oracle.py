"""An eager Hugging Face forward that applies ZeroTuning to dense probabilities in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM

from calibrators import reference

NAME = "zerotuning_oracle"


class Oracle:
    """The model in float32, every attention layer computed by `calibrators.reference`."""

    def __init__(self, folder: Path) -> None:
        AttentionInterface.register(NAME, self._attention)
        self.model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        config = self.model.config
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.gamma = torch.ones(self.layers, self.heads)

    def log_probabilities(self, tokens: list[int], gamma: Tensor) -> Tensor:
        """Log-probability of each token after the first, given those before it.

        Args:
            tokens: the whole sequence, prompt and answer.
            gamma: `[layers, heads]`, 1 where nothing is calibrated.
        """
        self.gamma = gamma
        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)[:-1]
        return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def table(self, setting: dict[str, Any]) -> Tensor:
        """`gamma` `[layers, heads]` of a request's setting, read independently of the server."""
        gamma = torch.ones(self.layers, self.heads)
        layers, heads = setting.get("layers", "all"), setting.get("heads", "all")
        for layer in range(self.layers) if layers == "all" else layers:
            chosen = heads.get(str(layer), []) if isinstance(heads, dict) else heads
            gamma[layer, slice(None) if chosen == "all" else chosen] = setting["gamma"]
        return gamma

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        positions = torch.arange(q.shape[0])
        p = reference.probabilities(q, k, positions, reference.Geometry(scaling))
        changed = reference.zerotuning(p, self.gamma[module.layer_idx])
        return reference.attend(changed, v)[None], None
