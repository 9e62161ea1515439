"""Dense attention with full probability rows: the specification in code.

Slow and obvious on purpose, and the oracle of every fast path. Runs in float32 or float64.
Shapes: `query` `[rows, query_heads, head_dim]`, `key` and `value` `[keys, kv_heads, head_dim]`,
`positions` int `[rows]`, the absolute position of each row; key `j` has position `j`.
Probabilities are `[rows, query_heads, keys]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """How logits are formed from queries and keys.

    Attributes:
        scale: factor on `q . k`.
        soft_cap: logits become `soft_cap * tanh(logit / soft_cap)`; 0 for none.
        window: a row at `i` sees keys `j > i - window`; None for all.
        alibi_slopes: `[query_heads]`; adds `slope * (j - i)` to the logits.
        sinks: `[query_heads]`; a learned logit that takes probability and has no value.
    """

    scale: float
    soft_cap: float = 0.0
    window: int | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


def logits(query: Tensor, key: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """Scaled logits `s_ij`, minus infinity where row `i` does not see key `j`."""
    group = query.shape[1] // key.shape[1]
    repeated = key.repeat_interleave(group, dim=1)
    score = torch.einsum("rhd,khd->rhk", query, repeated) * geometry.scale
    if geometry.soft_cap:
        score = geometry.soft_cap * torch.tanh(score / geometry.soft_cap)
    distance = torch.arange(key.shape[0]) - positions[:, None]
    if geometry.alibi_slopes is not None:
        score = score + geometry.alibi_slopes[:, None].to(score) * distance[:, None, :]
    hidden = distance > 0
    if geometry.window is not None:
        hidden |= distance <= -geometry.window
    return score.masked_fill(hidden[:, None, :], float("-inf"))


def log_sum_exp(score: Tensor, geometry: Geometry) -> Tensor:
    """`L_i = logsumexp_j s_ij`, learned sinks included; `[rows, query_heads]`."""
    total = score.logsumexp(-1)
    if geometry.sinks is None:
        return total
    return torch.logaddexp(total, geometry.sinks.to(total))


def probabilities(query: Tensor, key: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """`p_ij = exp(s_ij - L_i)`."""
    score = logits(query, key, positions, geometry)
    return torch.exp(score - log_sum_exp(score, geometry)[..., None])


def attend(probability: Tensor, value: Tensor) -> Tensor:
    """`O_i = sum_j p_ij v_j`; `[rows, query_heads, head_dim]`."""
    group = probability.shape[1] // value.shape[1]
    return torch.einsum("rhk,khd->rhd", probability, value.repeat_interleave(group, dim=1))


def zerotuning(probability: Tensor, gamma: Tensor) -> Tensor:
    """ZeroTuning on probabilities; `gamma` broadcasts to `[rows, query_heads]`."""
    denominator = 1 + (gamma - 1) * probability[..., 0]
    weighted = probability.clone()
    weighted[..., 0] *= gamma
    return weighted / denominator[..., None]


def column_means(probability: Tensor) -> Tensor:
    """`s_j = sum_{i >= j} p_ij / (P - j)` of a whole prompt; `[query_heads, P]`.

    Args:
        probability: `[P, query_heads, P]`, rows in order.
    """
    length = probability.shape[0]
    return probability.sum(0) / torch.arange(length, 0, -1).to(probability)


def act(probability: Tensor, sinks: Tensor, beta: Tensor) -> Tensor:
    """ACT on probabilities: sinks are scaled by `beta`, the rest of a row takes up their mass.

    A row that sees no sink, or next to nothing else, is unchanged.

    Args:
        probability: `[rows, query_heads, keys]`.
        sinks: bool, broadcasts to `probability`.
        beta: broadcasts to `[rows, query_heads]`.
    """
    mass = torch.where(sinks, probability, 0).sum(-1)
    rest = torch.where(1 - mass < 1e-6, 1, (1 - beta * mass) / (1 - mass))
    factor = torch.where(1 - mass < 1e-6, 1, beta)
    return torch.where(sinks, probability * factor[..., None], probability * rest[..., None])


def recombine(
    probability: Tensor,
    pools: Sequence[Tensor],
    factors: Sequence[Tensor],
    rest: Tensor,
) -> Tensor:
    """The pool algebra on dense probabilities: `c_g p_j` in pool `g`, `c_rest p_j` elsewhere.

    Args:
        probability: `[rows, query_heads, keys]`.
        pools: per pool, bool `[..., keys]` that broadcasts to `probability`; disjoint.
        factors: per pool `c_g` `[rows, query_heads]`, or `[rows, query_heads, keys]` where the
            pool carries weights.
        rest: `c_rest`, `[rows, query_heads]`.
    """
    result = probability * rest[..., None]
    for pool, factor in zip(pools, factors, strict=True):
        each = factor if factor.dim() == probability.dim() else factor[..., None]
        result = torch.where(pool, probability * each, result)
    return result


def residual_peaks(stream: Tensor, channels: Tensor) -> Tensor:
    """`max_{d in channels} |x_d| / sqrt(mean_k x_k^2 + 1e-6)` of each token; `[tokens]`.

    Args:
        stream: `[tokens, hidden_size]`, what enters a layer, before its norm.
        channels: int64 `[n]`, at least one.
    """
    return stream[:, channels].abs().amax(-1) / (stream.pow(2).mean(-1) + 1e-6).sqrt()


def var_selected(
    probability: Tensor, images: Tensor, sinks: Tensor, rho: float, min_visual_mass: float
) -> Tensor:
    """Which rows and heads VAR changes; bool `[rows, query_heads]`.

    Args:
        probability: of text rows behind an image alone.
        images: bool `[keys]`, image tokens.
        sinks: bool `[keys]`, sinks of the layer, in images and outside.
        rho: least share of the attention to images that is not on sinks.
        min_visual_mass: least attention to images.
    """
    seen = probability[..., images].sum(-1)
    on_sinks = probability[..., images & sinks].sum(-1)
    besides = seen - on_sinks
    looking = (on_sinks > 0) & (seen >= min_visual_mass) & (besides > 0)
    return looking & (1 - on_sinks / torch.where(seen > 0, seen, 1) >= rho)


def var(
    probability: Tensor,
    images: Tensor,
    sinks: Tensor,
    share: float,
    rho: float,
    min_visual_mass: float,
) -> Tensor:
    """VAR on probabilities: `share` of the sinks' mass goes to image tokens that are none.

    Args as of `var_selected`.
    """
    others = images & ~sinks
    taken = share * probability[..., sinks].sum(-1, keepdim=True)
    present = probability[..., others].sum(-1, keepdim=True)
    moved = probability.clone()
    moved[..., sinks] *= 1 - share
    moved[..., others] *= 1 + taken / torch.where(present > 0, present, 1)
    selected = var_selected(probability, images, sinks, rho, min_visual_mass)
    return torch.where(selected[..., None], moved, probability)


def upper_half(values: Tensor) -> Tensor:
    """The heads with the greatest values, half of them rounded down but one at least; bool.

    A head is in where fewer than so many come before it: those with more, and those of a lower
    index with as much. `values` is `[..., query_heads]`.
    """
    heads = values.shape[-1]
    mine, others = values[..., :, None], values[..., None, :]
    lower = torch.ones(heads, heads, dtype=torch.bool).tril(-1)
    before = (others > mine) | ((others == mine) & lower)
    return before.sum(-1) < max(heads // 2, 1)


def gift_saliency(probability: Tensor, content: Sequence[int], images: Tensor) -> Tensor | None:
    """GIFT's map over image tokens, in [0, 1]; None where it is the same everywhere.

    Args:
        probability: `[P, query_heads, P]` of the saliency layer, rows in order.
        content: rows of content words.
        images: bool `[P]`.
    """
    rows = [probability[i][:, images] - probability[i - 1][:, images] for i in content]
    growth = torch.stack(rows, 1).clamp(min=0)
    chosen = upper_half(growth.sum((1, 2)))
    gaze = growth[chosen].mean((0, 1))
    if gaze.numel() < 2:
        return None
    centre, limit = gaze.mean(), 3 * gaze.std(unbiased=True)
    gaze = gaze.clamp(centre - limit, centre + limit)
    if gaze.max() == gaze.min():
        return None
    return (gaze - gaze.min()) / (gaze.max() - gaze.min())


def gift(
    probability: Tensor, images: Tensor, weights: Tensor, query: Tensor, beta: float
) -> Tensor:
    """GIFT on probabilities of the last prompt row and later ones.

    A row that sees no image token is unchanged, and so is one that would be divided by next to
    nothing.

    Args:
        probability: `[rows, query_heads, keys]`.
        images: bool `[keys]`.
        weights: `w_j` `[keys]`, read at image tokens.
        query: bool `[keys]`, text of the last user message.
        beta: factor on the enhancement of the query.
    """
    visual = probability[..., images].sum(-1)
    enhanced = (probability * weights)[..., images].sum(-1)
    looking, reading = upper_half(visual), upper_half(probability[..., query].sum(-1))
    before = torch.where(looking, visual, 0).sum(-1, keepdim=True)
    after = torch.where(looking, enhanced, 0).sum(-1, keepdim=True)
    r = beta * after / torch.where(before > 0, before, 1)
    weighted = torch.where(looking[..., None] & images, probability * weights, probability)
    weighted = torch.where(reading[..., None] & query, probability * r[..., None], weighted)
    total = weighted.sum(-1, keepdim=True)
    kept = (before == 0)[..., None] | (total < 1e-6)
    return torch.where(kept, probability, weighted / torch.where(kept, 1, total))


def vhr_heads(with_images: Tensor, without_images: Tensor) -> Tensor:
    """The heads that VHR reinforces; bool `[query_heads]`.

    Args:
        with_images: `[query_heads, head_dim]`, outputs of the last prompt row.
        without_images: the same of the prompt without its image tokens.
    """
    divergence = (with_images - without_images).norm(dim=-1)
    strength = without_images.norm(dim=-1) ** 2
    far = divergence > divergence.mean() + divergence.std(unbiased=False)
    strong = strength > strength.mean() + strength.std(unbiased=False)
    divergence = torch.where(far & strong, 0, divergence)
    return divergence > divergence.median()
