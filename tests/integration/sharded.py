"""Run fixed batches on engines of one or more tensor-parallel ranks, and write the results.

python -m tests.integration.sharded RANKS OUT.json MODEL...
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from calibrators import registry
from calibrators.interface import ModelFacts, Prefill
from server.engine.facts import model_facts
from server.engine.payload import KEY, Payload, Report
from server.engine.reports import listen
from server.engine.startup import CPU_WORKER, SCHEDULER
from tests.fixtures.llama import VOCABULARY

CALIBRATORS = ("zerotuning", "act", "faulty", "coupled", "sighted")
NEW_TOKENS = 8

# By name: prompt length and calibration. Of two ranks the first has heads 0 to 3.
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "mild": (40, {"gamma": 0.6}),
    "strong": (150, {"gamma": 6.5}),
    "weak": (90, {"gamma": 0.05}),
    "one token": (1, {"gamma": 0.2}),
    "neutral": (33, {"gamma": 1.0}),
    "first rank": (70, {"gamma": 4.0, "heads": [0, 3]}),
    "second rank": (70, {"gamma": 4.0, "heads": [4, 7]}),
    "second rank, one layer": (100, {"gamma": 20.0, "heads": [6], "layers": [2]}),
    "both ranks by layer": (65, {"gamma": 0.3, "heads": {"0": [1], "3": [5, 6]}}),
    "some layers": (64, {"gamma": 3.0, "layers": [1, 3]}),
}
# Each fails on one rank alone, by a result that is not finite or by raising.
FAULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "nonsense on the first rank": (50, {"method": "faulty", "gamma": 2.0, "heads": [2]}),
    "nonsense on the second rank": (50, {"method": "faulty", "gamma": 2.0, "heads": [5]}),
    "raises on the second rank": (50, {"method": "faulty", "gamma": 99.0, "heads": [7]}),
    # Of several ranks the others would wait for the last one's masses.
    "coupled, has no plan on the last rank": (50, {"method": "coupled", "gamma": 99.0}),
    "coupled, raises on the last rank": (50, {"method": "coupled", "gamma": 98.0}),
    "sighted, has no plan on the last rank": (50, {"method": "sighted", "gamma": 97.0}),
}
# What methods see before they act: all selected heads of the layer, or the whole prompt.
COUPLED: dict[str, tuple[int, dict[str, Any]]] = {
    "coupled": (150, {"method": "coupled", "gamma": 3.0}),
    "sighted": (100, {"method": "sighted", "gamma": 3.0}),
    "act": (90, {"method": "act", "alpha": 2.0, "layers": "all"}),
    "act, second rank": (70, {"method": "act", "alpha": 2.0, "heads": [5, 6], "decode": "row"}),
    "coupled, first rank": (80, {"method": "coupled", "gamma": 5.0, "heads": [0, 2]}),
    "coupled, both ranks by layer": (
        60,
        {"method": "coupled", "gamma": 4.0, "heads": {"0": [1, 6], "2": [7], "3": [3, 4, 5]}},
    ),
}


def prompt(seed: int, length: int) -> list[int]:
    """Token ids of the small vocabulary; no two seeds share a prefix."""
    return [10 + (seed * 61 + i * i * 31 + i * 7) % (VOCABULARY - 10) for i in range(length)]


def request(
    name: str, seed: int, length: int, calibration: dict[str, Any] | None, facts: ModelFacts
) -> tuple[TokensPrompt, SamplingParams]:
    """A prompt and its sampling, with the payload a front end would send along."""
    tokens = TokensPrompt(prompt_token_ids=prompt(seed, length))
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    if calibration is not None:
        settings = {"method": "zerotuning", **calibration}
        calibrator = registry.load(CALIBRATORS)[settings["method"]]
        bound = calibrator.bind(calibrator.Settings.model_validate(settings), facts)
        tokens["cache_salt"] = json.dumps(settings)
        prefill = calibrator.prefill(bound)
        payload = Payload(name, (bound,), prefill, shareable=prefill is Prefill.ANY)
        params.extra_args = {KEY: payload.to_extra_args()}
    return tokens, params


def generate(llm: LLM, batch: dict[str, Any], reports: dict[str, Report]) -> dict[str, Any]:
    """Results of a batch by name; all its requests are queued before the first step."""
    facts = model_facts(llm.llm_engine.vllm_config)
    seeds = {name: seed for seed, name in enumerate({**REQUESTS, **FAULTS, **COUPLED})}
    pairs = [
        request(name, seeds[name], length, calibration, facts)
        for name, (length, calibration) in batch.items()
    ]
    outputs = llm.generate([p for p, _ in pairs], [s for _, s in pairs], use_tqdm=False)
    return {
        name: {
            "finish": output.outputs[0].finish_reason,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                entry.logprob for step in output.outputs[0].logprobs for entry in step.values()
            ],
            "cached": output.num_cached_tokens,
            "tally": _tally(reports.get(name)),
        }
        for name, output in zip(batch, outputs, strict=True)
    }


def _tally(report: Report | None) -> dict[str, Any] | None:
    """None without calibration, and where it failed before it began."""
    return asdict(report.tallies[0]) if report is not None and report.tallies else None


def run(ranks: int, model: str) -> dict[str, Any]:
    """Results by batch and name."""
    llm = LLM(
        model,
        tensor_parallel_size=ranks,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=128,
        block_size=32,
        kv_cache_memory_bytes=1 << 27,
        worker_cls=CPU_WORKER,
        scheduler_cls=SCHEDULER,
        additional_config={KEY: {"calibrators": CALIBRATORS}},
    )
    reports: dict[str, Report] = {}
    listen(llm.llm_engine, lambda report, _: reports.update({report.ticket: report}))
    plain = {name: (length, None) for name, (length, _) in {**REQUESTS, **COUPLED}.items()}
    neighbours = {name: REQUESTS[name] for name in ("mild", "second rank")}
    batches = {"plain": plain, "calibrated": REQUESTS, "again": REQUESTS}
    batches |= {"coupled": {**COUPLED, **neighbours}, "coupled again": COUPLED}
    batches |= {f"beside {name}": {name: fault, **neighbours} for name, fault in FAULTS.items()}
    results = {name: generate(llm, batch, reports) for name, batch in batches.items()}
    llm.llm_engine.engine_core.shutdown()
    return results


if __name__ == "__main__":
    _, ranks, out, *models = sys.argv
    with open(out, "w") as file:
        json.dump({model: run(int(ranks), model) for model in models}, file)
