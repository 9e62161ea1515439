"""An eager Hugging Face forward whose dense probabilities anybody may look at and rewrite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM

from calibrators import reference

NAME = "dense"
Act = Callable[["Seen", Tensor], Tensor]


class Seen:
    """A layer of one forward: what entered it `[tokens, hidden_size]`, its values."""

    layer: int
    stream: Tensor
    value: Tensor

    def outputs(self, p: Tensor, row: int) -> Tensor:
        """Head outputs of one row under probabilities `p`; `[query_heads, head_dim]`."""
        return reference.attend(p[row : row + 1], self.value)[0]


class Dense:
    """The model in float32 or float64."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        AttentionInterface.register(NAME, self._attention)
        self.model = self._load(folder, dtype).eval()
        self._seen = Seen()
        self._act: Act = _leave
        for layer in self._decoder().layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME)

    def _decoder(self) -> Any:
        return self.model.model

    def log_probabilities(self, tokens: list[int], act: Act, **inputs: Tensor) -> Tensor:
        """Log-probability of each token after the first; `act` rewrites `[rows, heads, keys]`."""
        self._act = act
        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens]), use_cache=False, **inputs).logits[0]
        logprobs = logits.log_softmax(-1)[:-1]
        return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen.stream = (args[0] if args else kwargs["hidden_states"])[0]

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
        p = reference.probabilities(q, k, torch.arange(len(q)), reference.Geometry(scaling))
        self._seen.layer, self._seen.value = module.layer_idx, v
        return reference.attend(self._act(self._seen, p), v)[None], None


def _leave(seen: Seen, p: Tensor) -> Tensor:
    return p
