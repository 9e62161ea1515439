"""An eager Hugging Face forward that applies a method to dense probabilities in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM

from calibrators import reference

NAME = "dense_oracle"
# A layer's probabilities `[rows, heads, keys]`, rewritten.
Rewrite = Callable[[int, Tensor], Tensor]


def plain(layer: int, p: Tensor) -> Tensor:
    """What a request without calibration gets."""
    return p


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
        self.rewrite: Rewrite = plain

    def log_probabilities(self, tokens: list[int], rewrite: Rewrite) -> Tensor:
        """Log-probability of each token after the first, given those before it.

        Args:
            tokens: the whole sequence, prompt and answer.
            rewrite: what happens to the probabilities of each layer.
        """
        self.rewrite = rewrite
        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)[:-1]
        return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def selected(self, setting: dict[str, Any], first: int = 0) -> Tensor:
        """bool `[layers, heads]` of a request's setting, read independently of the server.

        Args:
            setting: of the request.
            first: the first layer where the setting names none.
        """
        chosen = torch.zeros(self.layers, self.heads, dtype=torch.bool)
        layers, heads = setting.get("layers"), setting.get("heads", "all")
        every = range(0 if layers == "all" else first, self.layers)
        for layer in layers if isinstance(layers, list) else every:
            named = heads.get(str(layer), []) if isinstance(heads, dict) else heads
            chosen[layer, slice(None) if named == "all" else named] = True
        return chosen

    def zerotuning(self, setting: dict[str, Any]) -> Rewrite:
        """ZeroTuning of a setting, which has a gamma or `strengths`, gammas by layer and head."""
        if "strengths" in setting:
            gamma = torch.ones(self.layers, self.heads)
            for layer, heads in setting["strengths"].items():
                for head, strength in heads.items():
                    gamma[int(layer), int(head)] = strength
        else:
            gamma = torch.where(self.selected(setting), float(setting["gamma"]), 1.0)
        return lambda layer, p: reference.zerotuning(p, gamma[layer])

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
        return reference.attend(self.rewrite(module.layer_idx, p), v)[None], None


class ACT:
    """ACT of one request on the dense probabilities of its sequence, and what it found.

    Attributes:
        margin: how near a probability or a column mean came to its bound, relative to it; heads
            that are selected and keys after the first.
        left: the least that a rewritten row pays to keys that are no sinks.
        sinks: number of sinks over all selected (layer, head).
        touched: bool `[rows]`, rows rewritten in some layer.
        before: sum of the sinks' mass over rewritten (layer, head, row).
        count: number of those.
    """

    def __init__(self, oracle: Oracle, setting: dict[str, Any], prompt: int) -> None:
        self._setting = {"beta": 0.4, "decode": "frozen"} | setting
        self._chosen = oracle.selected(setting, first=2)
        self._prompt = prompt
        self.margin, self.left = float("inf"), 1.0
        self.sinks, self.before, self.count = 0, 0.0, 0
        self.touched = torch.zeros(0, dtype=torch.bool)

    @property
    def pairs(self) -> int:
        """Number of selected (layer, head)."""
        return int(self._chosen.sum())

    def __call__(self, layer: int, p: Tensor) -> Tensor:
        """Rewrite one layer."""
        if layer == 0:
            self.touched = torch.zeros(len(p), dtype=torch.bool)
        chosen = self._chosen[layer]
        if not chosen.any():
            return p
        sinks = self._find(p, chosen)
        mass = torch.where(sinks, p, 0).sum(-1)
        rewritten = (mass > 0) & (1 - mass >= 1e-6)
        self.touched |= rewritten.any(1)
        self.before += mass[rewritten].sum().item()
        self.count += int(rewritten.sum())
        self.left = min([self.left, *(1 - mass[rewritten]).tolist()])
        return reference.act(p, sinks, torch.tensor(float(self._setting["beta"])))

    def _find(self, p: Tensor, chosen: Tensor) -> Tensor:
        """Sinks `[rows, heads, keys]` of the selected heads."""
        length, decode = self._prompt, self._setting["decode"]
        sinks = torch.zeros(p.shape, dtype=torch.bool)
        means = reference.column_means(p[:length, :, :length])
        found = self._above(means[None], torch.tensor([length]), chosen)[0]
        self.sinks += int(found.sum())
        sinks[: len(p) if decode == "frozen" else length, :, :length] = found
        if decode == "row":
            sinks[length:] = self._above(p[length:], torch.arange(length, len(p)) + 1, chosen)
        return sinks

    def _above(self, values: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """Which values `[n, heads, keys]` exceed theta; `keys` is how many each of `n` looks at."""
        theta = self._setting.get("threshold")
        bound = self._setting.get("alpha", 5.0) / keys if theta is None else torch.tensor([theta])
        ratio = (values / bound[:, None, None])[:, chosen, 1:]
        if ratio.numel():
            self.margin = min(self.margin, (ratio - 1).abs().min().item())
        above = values > bound[:, None, None]
        above[:, ~chosen] = False
        above[..., 0] = False
        return above
