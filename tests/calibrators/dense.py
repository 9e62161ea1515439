"""Dense attention for tests of coefficients, and what an engine would measure of it."""

import torch

from calibrators.interface import Masses


def causal(seed, length, heads, spread=2.0):
    """Probabilities `[length, heads, length]` of a causal layer in float64."""
    generator = torch.Generator().manual_seed(seed)
    score = spread * torch.randn(length, heads, length, generator=generator, dtype=torch.float64)
    hidden = torch.ones(length, length).triu(1).bool()
    return score.masked_fill(hidden[:, None, :], float("-inf")).softmax(-1)


def among(keys, length):
    """Bool `[length]`."""
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[torch.as_tensor(keys, dtype=torch.long)] = True
    return chosen


def measured(p, plan, dtype):
    """Masses of a plan's pools in probabilities `[rows, heads, keys]`, and the pools as masks."""
    masks = [among(pool.keys, p.shape[-1]) for pool in plan.pools]
    plain = torch.stack([p[..., mask].sum(-1) for mask in masks], -1)
    rest = p[..., ~torch.stack(masks).any(0)].sum(-1)
    weighted = None
    if any(pool.weights is not None for pool in plan.pools):
        weighted = torch.zeros_like(plain)
        for g, pool in enumerate(plan.pools):
            if pool.weights is not None:
                weights = torch.from_numpy(pool.weights).to(p)
                weighted[..., g] = (p[..., masks[g]] * weights).sum(-1)
        weighted = weighted.to(dtype)
    return Masses(plain.to(dtype), rest.to(dtype), weighted), masks


def parameters(plan, rows, dtype=torch.float32):
    """A plan's parameters for some rows, `[rows, heads]` each."""
    return {
        name: torch.from_numpy(values).to(dtype).expand(rows, -1)
        for name, values in plan.parameters.items()
    }
