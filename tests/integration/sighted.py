"""The vision methods on a LLaVA's dense probabilities, and what they found there.

Every rule that hangs on a comparison notes how near it came to going the other way, relative to
what is compared. Two correct computations may disagree about a close one, and then about all that
follows, so tests pick prompts on which nothing is close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from calibrators import reference
from tests.fixtures.llava import LAYERS, QUERY_HEADS, SINK_CHANNELS
from tests.integration.dense import NAME, Dense, Seen

LAST_BUT_ONE = LAYERS - 1


class DenseLlava(Dense):
    """The LLaVA of `tests.fixtures.llava`, its language model's attention dense."""

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        model.model.language_model.set_attn_implementation(NAME)
        return model

    def _decoder(self) -> Any:
        return self.model.model.language_model


@dataclass
class Look:
    """Where things are in one sequence, as a test knows it.

    Attributes:
        prompt: number of prompt tokens.
        tokens: of the whole sequence, generated ones included.
        image: bool `[tokens]`.
        query: bool `[tokens]`, the last user message's text.
        content: positions of content words.
        words: number of them.
    """

    prompt: int
    tokens: list[int]
    image: Tensor
    query: Tensor
    content: list[int]
    words: int

    @property
    def fed(self) -> int:
        """Rows the engine computes: the last token is sampled and never fed back."""
        return len(self.tokens) - 1


def layers_of(setting: dict[str, Any], usual: Sequence[int]) -> list[int]:
    """Selected layers of a request."""
    layers = setting.get("layers", usual)
    return [*range(LAYERS)] if layers == "all" else [*layers]


@dataclass
class Found:
    """What a method did.

    Attributes:
        margin: the least distance of anything from its bound, relative.
        touched: rows rewritten in some layer.
        statistics: means as the receipt has them.
    """

    margin: float = float("inf")
    touched: set[int] = field(default_factory=set)
    statistics: dict[str, Any] = field(default_factory=dict)

    def near(self, values: Tensor, bound: float | Tensor) -> None:
        """Note how near values came to a bound."""
        if values.numel() and not isinstance(bound, float | int):
            self.margin = min(self.margin, ((values - bound) / bound).abs().min().item())
        elif values.numel() and bound:
            self.margin = min(self.margin, (values / bound - 1).abs().min().item())


class VAR:
    """VAR of a setting."""

    def __init__(self, setting: dict[str, Any], look: Look) -> None:
        usual = {"tau": 20.0, "rho": 0.5, "share": 0.6, "min_visual_mass": 0.2}
        self._set = usual | {"sink_dims": list(SINK_CHANNELS)} | setting
        self._layers = layers_of(setting, range(2, LAST_BUT_ONE))
        self._look = look
        self.found = Found()
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._count = 0

    def __call__(self, seen: Seen, p: Tensor) -> Tensor:
        """Rewrite a layer."""
        if seen.layer not in self._layers:
            return p
        look, s, found = self._look, self._set, self.found
        peaks = reference.residual_peaks(seen.stream, torch.tensor(s["sink_dims"]))[: look.prompt]
        found.near(peaks, s["tau"])
        sinks = torch.zeros(len(look.tokens), dtype=torch.bool)
        sinks[: look.prompt] = peaks > s["tau"]
        first = int(look.image.nonzero()[0])
        first += int((~look.image[first:]).nonzero()[0])
        rows = (torch.arange(len(look.tokens)) >= first) & ~look.image
        limits = look.image, sinks, s["rho"], s["min_visual_mass"]
        chosen = reference.var_selected(p[rows], *limits)
        after = p.clone()
        after[rows] = reference.var(p[rows], look.image, sinks, s["share"], *limits[2:])
        self._note(p, after, rows, sinks, chosen)
        return after

    def _note(self, p: Tensor, after: Tensor, rows: Tensor, sinks: Tensor, chosen: Tensor) -> None:
        look, s, found = self._look, self._set, self.found
        mass = p[rows][..., look.image].sum(-1)
        on_sinks = p[rows][..., look.image & sinks].sum(-1)
        if on_sinks.any():
            found.near(mass, s["min_visual_mass"])
            found.near(1 - on_sinks / mass, s["rho"])
        changed = chosen.any(1) & (s["share"] > 0)
        found.touched |= set(rows.nonzero()[:, 0][changed].tolist())
        fed = rows.nonzero()[:, 0] < look.fed
        others = look.image & ~sinks
        self._count += int(fed.sum()) * QUERY_HEADS
        self._sums += torch.tensor(
            [
                float((sinks & look.image).sum()),
                float((sinks & ~look.image).sum()),
                float(chosen[fed].sum()),
                float(p[rows][fed][..., others].sum()),
                float(after[rows][fed][..., others].sum()),
            ],
            dtype=torch.float64,
        )
        names = ("visual_sinks", "text_sinks", "selected_share")
        names += ("visual_nonsink_mass_before", "visual_nonsink_mass_after")
        counts = torch.tensor([len(self._layers)] * 2 + [self._count] * 3)
        found.statistics = dict(zip(names, (self._sums / counts).tolist(), strict=True))


class GIFT:
    """GIFT of a setting; `saliency` has to see the sequence first, in a forward of its own."""

    def __init__(self, setting: dict[str, Any], look: Look) -> None:
        third = LAYERS // 3
        usual = {"alpha": 5.0, "beta": 1.0, "saliency_layer": third}
        self._set = usual | setting
        self._layers = layers_of(setting, range(third, 2 * LAYERS // 3 + 1))
        self._look = look
        self.found = Found()
        self.map: Tensor | None = None
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._count = 0

    def saliency(self, seen: Seen, p: Tensor) -> Tensor:
        """Take the map; changes nothing."""
        look, prompt = self._look, self._look.prompt
        if seen.layer == self._set["saliency_layer"]:
            rows = [row for row in look.content if 0 < row < prompt - 1]
            images = look.image[:prompt]
            of_prompt = p[:prompt, :, :prompt]
            self.map = reference.gift_saliency(of_prompt, rows, images)
            growth = [(of_prompt[i] - of_prompt[i - 1])[:, images].clamp(min=0) for i in rows]
            self._rank(torch.stack(growth, 1).sum((1, 2)))
        return p

    def __call__(self, seen: Seen, p: Tensor) -> Tensor:
        """Rewrite a layer."""
        if seen.layer not in self._layers or self.map is None:
            return p
        look, start = self._look, self._look.prompt - 1
        weights = torch.ones(len(look.tokens))
        weights[look.image] = torch.exp(self._set["alpha"] * self.map).to(weights)
        rows = p[start:]
        visual, query = rows[..., look.image].sum(-1), rows[..., look.query].sum(-1)
        self._rank(visual)
        self._rank(query)
        after = p.clone()
        beta = self._set["beta"]
        after[start:] = reference.gift(rows, look.image, weights, look.query, beta)
        half = reference.upper_half(visual)
        seen_mass = torch.where(half, visual, 0).sum(-1)
        r = beta * torch.where(half, (rows * weights)[..., look.image].sum(-1), 0).sum(-1)
        self._note(r / seen_mass, visual, after[start:][..., look.image].sum(-1))
        self.found.touched |= set(range(start, len(look.tokens)))
        return after

    def _note(self, r: Tensor, before: Tensor, after: Tensor) -> None:
        fed = self._look.fed - self._look.prompt + 1
        means = [r[:fed].mean(), before[:fed].mean(), after[:fed].mean()]
        self._count += 1
        self._sums += torch.tensor([float(mean) for mean in means])
        names = ("mean_r", "visual_mass_before", "visual_mass_after")
        numbers = (self._sums / self._count).tolist()
        self.found.statistics = dict(zip(names, numbers, strict=True))
        self.found.statistics["content_words"] = float(self._look.words)

    def _rank(self, values: Tensor) -> None:
        """Note how near the last head of the upper half is to the next."""
        ordered = values.sort(-1, descending=True).values
        half = max(values.shape[-1] // 2, 1)
        self.found.near(ordered[..., half - 1], ordered[..., half])


class VHR:
    """VHR of a setting; `text` has to see the prompt without its images first."""

    def __init__(self, setting: dict[str, Any], look: Look) -> None:
        self._set = {"alpha": 2.0, "rows": "all"} | setting
        self._layers = layers_of(setting, sorted({1, *range(LAYERS - 7 * LAYERS // 16, LAYERS)}))
        self._look = look
        self.found = Found()
        self._text: dict[int, Tensor] = {}

    def text(self, seen: Seen, p: Tensor) -> Tensor:
        """Look at the last row of the prompt without images; changes nothing."""
        self._text[seen.layer] = seen.outputs(p, len(p) - 1)
        return p

    def __call__(self, seen: Seen, p: Tensor) -> Tensor:
        """Rewrite a layer: scaling a head's output is scaling its probabilities."""
        if seen.layer not in self._layers:
            return p
        look = self._look
        whole, text = seen.outputs(p, look.prompt - 1), self._text[seen.layer]
        chosen = reference.vhr_heads(whole, text)
        self._margins(whole, text)
        heads = self.found.statistics.setdefault("heads_selected", {})
        heads[str(seen.layer)] = chosen.nonzero()[:, 0].tolist()
        after = p.clone()
        start = 0 if self._set["rows"] == "all" else look.prompt - 1
        after[start:, chosen] *= self._set["alpha"]
        if chosen.any():
            self.found.touched |= set(range(start, len(look.tokens)))
        return after

    def _margins(self, whole: Tensor, text: Tensor) -> None:
        divergence, strength = (whole - text).norm(dim=-1), text.norm(dim=-1) ** 2
        for values in (divergence, strength):
            self.found.near(values, (values.mean() + values.std(unbiased=False)).item())
        ordered = divergence.sort().values
        self.found.near(ordered[1:], ordered[:-1])
