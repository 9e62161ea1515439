"""Run fixed batches on an engine of one's own, with or without Trimtab, and write the results.

    python -m tests.integration.offline stock|trimtab MODEL OUT.json

Offline, because only so the composition of every batch is known: all requests of a batch are
queued before the first step.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

# What "stock" means: vLLM finds no plug-in of ours. Has to be said before vLLM is imported.
if __name__ == "__main__" and sys.argv[1] == "stock":
    os.environ["VLLM_PLUGINS"] = ""

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from calibrators.interface import Bound
from server.engine.payload import KEY, Payload
from server.engine.startup import SCHEDULER, WORKER

SEVERE = Bound("zerotuning", {"gamma": 0.2, "layers": "all", "heads": "all"}, 30, 270)
MILD = Bound("zerotuning", {"gamma": 1.5, "layers": [4, 9], "heads": [0, 7]}, 2, 4)


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return [1000 + (seed * 7919 + i * i * 31 + i) % 40000 for i in range(length)]


# Each batch: (name, seed, prompt length, calibration). Names are unique; prefix caching is on.
BATCHES: list[list[tuple[str, int, int, Bound | None]]] = [
    [("alone", 1, 300, None)],
    [("short alone", 2, 5, None)],
    [
        ("first", 3, 290, None),
        ("severe neighbour", 4, 310, SEVERE),
        ("second", 5, 17, None),
        ("mild neighbour", 6, 140, MILD),
        ("third", 7, 1, None),
        ("severe short neighbour", 8, 1, SEVERE),
    ],
    [("before plain", 9, 300, SEVERE)],
    [("after severe", 9, 300, None)],
    [("plain again", 9, 300, None)],
    [("severe again", 9, 300, SEVERE)],
    [("mild on the same prompt", 9, 300, MILD)],
]


def request(seed: int, length: int, bound: Bound | None) -> tuple[TokensPrompt, SamplingParams]:
    """A prompt, salted by its calibration as the front end would, and its sampling."""
    tokens = TokensPrompt(prompt_token_ids=prompt(seed, length))
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=5, ignore_eos=True)
    if bound is not None:
        tokens["cache_salt"] = json.dumps(bound.params)[1:-1].replace('"', "")
        payload = Payload("ticket", (bound,))
        params.extra_args = {KEY: payload.to_extra_args()}
    return tokens, params


def run(mode: str, model: str) -> dict[str, Any]:
    """Results by name: tokens, log-probabilities, cached prompt tokens."""
    ours: dict[str, Any] = {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}
    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=1 << 29,
        **(ours if mode == "trimtab" else {}),
    )
    results = {}
    for batch in BATCHES:
        # The stock engine knows no calibration: neighbours run plain there, and batches of
        # calibrated requests alone are left out.
        known = [r for r in batch if mode == "trimtab" or r[3] is None or len(batch) > 1]
        bounds = [bound if mode == "trimtab" else None for *_, bound in known]
        if not known:
            continue
        pairs = [request(r[1], r[2], bound) for r, bound in zip(known, bounds, strict=True)]
        outputs = llm.generate([p for p, _ in pairs], [s for _, s in pairs], use_tqdm=False)
        for (name, *_), output in zip(known, outputs, strict=True):
            choice = output.outputs[0]
            results[name] = {
                "tokens": list(choice.token_ids),
                "logprobs": [
                    {token: asdict(entry)["logprob"] for token, entry in step.items()}
                    for step in choice.logprobs
                ],
                "cached": output.num_cached_tokens,
            }
    return results


if __name__ == "__main__":
    _, mode, model, out = sys.argv
    with open(out, "w") as file:
        json.dump(run(mode, model), file)
