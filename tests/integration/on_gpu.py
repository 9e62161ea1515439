"""Run fixed batches on a GPU with full graphs, with or without Trimtab, and write the results.

python -m tests.integration.on_gpu stock|trimtab BACKEND v1|v2|v2-async MODEL OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Before vLLM is imported; "stock" finds no plug-in of ours.
if __name__ == "__main__":
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(sys.argv[3] != "v1"))
    if sys.argv[1] == "stock":
        os.environ["VLLM_PLUGINS"] = ""

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from calibrators.interface import Bound
from server.engine.payload import KEY, Payload, Report
from server.engine.reports import listen
from server.engine.startup import GPU_WORKER, SCHEDULER

NEW_TOKENS = 12
LENGTHS = (5, 17, 64, 200, 311)
SEVERE = Bound("zerotuning", {"gamma": 0.2, "layers": "all", "heads": "all"}, 30, 270)
MILD = Bound("zerotuning", {"gamma": 1.5, "layers": [4, 9], "heads": [0, 7]}, 2, 4)
BOUNDS = {"severe": SEVERE, "mild": MILD, "plain": None}


def prompt(length: int) -> list[int]:
    """Token ids that no other length shares a prefix with."""
    return [1000 + (length * 7919 + i * i * 31 + i) % 40000 for i in range(length)]


def request(kind: str, length: int) -> tuple[TokensPrompt, SamplingParams]:
    """A prompt, salted by its calibration as the front end would, and its sampling."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    tokens = TokensPrompt(prompt_token_ids=prompt(length), cache_salt=kind)
    bound = BOUNDS[kind]
    if bound is not None:
        payload = Payload(f"{kind} {length}", (bound,))
        params.extra_args = {KEY: payload.to_extra_args()}
    return tokens, params


def run(mode: str, backend: str, runner: str, model: str) -> dict[str, Any]:
    """Answers and tallies by name: a batch of plain requests, and one of all kinds."""
    ours: dict[str, Any] = {"worker_cls": GPU_WORKER, "scheduler_cls": SCHEDULER}
    llm = LLM(
        model,
        dtype="bfloat16",
        attention_backend=backend,
        compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"},
        async_scheduling=runner == "v2-async",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        **(ours if mode == "trimtab" else {}),
    )
    reports: dict[str, Report] = {}
    listen(llm.llm_engine, lambda report, _: reports.update({report.ticket: report}))
    plain = [("plain", length) for length in LENGTHS]
    batches = {"plain": plain}
    if mode == "trimtab":
        batches["mixed"] = [(kind, length) for length in LENGTHS for kind in BOUNDS]
    results: dict[str, Any] = {}
    for batch, jobs in batches.items():
        # What an earlier batch has left in the cache was computed in other company.
        llm.reset_prefix_cache()
        pairs = [request(*job) for job in jobs]
        outputs = llm.generate([p for p, _ in pairs], [s for _, s in pairs], use_tqdm=False)
        for (kind, length), output in zip(jobs, outputs, strict=True):
            choice, report = output.outputs[0], reports.get(f"{kind} {length}")
            results[f"{batch}: {kind} {length}"] = {
                "tokens": list(choice.token_ids),
                "logprobs": [each.logprob for step in choice.logprobs for each in step.values()],
                "tally": None if report is None else report.to_transfer_params()["tallies"][0],
            }
    return results


if __name__ == "__main__":
    _, mode, backend, runner, model, out = sys.argv
    with open(out, "w") as file:
        json.dump(run(mode, backend, runner, model), file)
