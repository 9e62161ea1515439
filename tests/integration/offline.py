"""Run fixed batches on an engine of one's own, with or without Trimtab, and write the results.

    python -m tests.integration.offline stock|trimtab MODEL OUT.json

Offline, because only so the composition of every batch is known: all requests of a batch are
queued before the first step.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

# What "stock" means: vLLM finds no plug-in of ours. Has to be said before vLLM is imported.
if __name__ == "__main__" and sys.argv[1] == "stock":
    os.environ["VLLM_PLUGINS"] = ""

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from calibrators.interface import Bound
from server.engine.payload import KEY, Payload
from server.engine.startup import CPU_WORKER, SCHEDULER

SEVERE = Bound("zerotuning", {"gamma": 0.2, "layers": "all", "heads": "all"}, 30, 270)
MILD = Bound("zerotuning", {"gamma": 1.5, "layers": [4, 9], "heads": [0, 7]}, 2, 4)


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return [1000 + (seed * 7919 + i * i * 31 + i) % 40000 for i in range(length)]


@dataclass(frozen=True, slots=True)
class Job:
    """A request.

    Attributes:
        name: unique.
        seed: of its prompt.
        length: of its prompt.
        bound: its calibration.
        max_tokens: that it writes.
        salt: of its cached blocks, beside that of its calibration.
    """

    name: str
    seed: int
    length: int
    bound: Bound | None = None
    max_tokens: int = 16
    salt: str = ""


# Prefix caching is on.
BATCHES: list[list[Job]] = [
    [Job("alone", 1, 300)],
    [Job("short alone", 2, 5)],
    [
        Job("first", 3, 290),
        Job("severe neighbour", 4, 310, SEVERE),
        Job("second", 5, 17),
        Job("mild neighbour", 6, 140, MILD),
        Job("third", 7, 1),
        Job("severe short neighbour", 8, 1, SEVERE),
    ],
    [Job("before plain", 9, 300, SEVERE)],
    [Job("after severe", 9, 300)],
    [Job("plain again", 9, 300)],
    [Job("severe again", 9, 300, SEVERE)],
    [Job("mild on the same prompt", 9, 300, MILD)],
]
NEIGHBOURS = 31


def beside(first: Job) -> list[Job]:
    """A request and its neighbours, half of them calibrated."""
    others = [
        Job(f"{first.name} {i}", 30 + i, 10 + 3 * i, SEVERE if i % 2 else None, salt=first.name)
        for i in range(NEIGHBOURS)
    ]
    return [first, *others]


# The one that fails does so in its first step, after which it is gone; so is the sound one.
FAULTS = [
    beside(Job("sound", 20, 64, SEVERE, max_tokens=1)),
    beside(Job("failing", 20, 64, replace(SEVERE, method="faulty"))),
]


def request(job: Job) -> tuple[TokensPrompt, SamplingParams]:
    """A prompt, salted by its calibration as the front end would, and its sampling."""
    tokens = TokensPrompt(prompt_token_ids=prompt(job.seed, job.length))
    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, logprobs=5, ignore_eos=True)
    salt = job.salt
    if job.bound is not None:
        salt += json.dumps(job.bound.params)[1:-1].replace('"', "")
        payload = Payload("ticket", (job.bound,))
        params.extra_args = {KEY: payload.to_extra_args()}
    if salt:
        tokens["cache_salt"] = salt
    return tokens, params


def stock(batches: list[list[Job]]) -> list[list[Job]]:
    """Without calibration: neighbours run plain, and who was calibrated alone is left out."""
    return [
        [replace(job, bound=None) for job in batch]
        for batch in batches
        if len(batch) > 1 or batch[0].bound is None
    ]


def run(mode: str, model: str) -> dict[str, Any]:
    """Results by name: how it finished, tokens, log-probabilities, cached prompt tokens."""
    ours: dict[str, Any] = {"worker_cls": CPU_WORKER, "scheduler_cls": SCHEDULER}
    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=1 << 29,
        **(ours if mode == "trimtab" else {}),
    )
    results = {}
    for batch in BATCHES + FAULTS if mode == "trimtab" else stock(BATCHES):
        pairs = [request(job) for job in batch]
        outputs = llm.generate([p for p, _ in pairs], [s for _, s in pairs], use_tqdm=False)
        for job, output in zip(batch, outputs, strict=True):
            choice = output.outputs[0]
            results[job.name] = {
                "finished": choice.finish_reason,
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
