"""Run fixed batches on one of vLLM's model runners, and write the results.

    python -m tests.integration.runners v1|v2|v2-async OUT.json MODEL

The V2 runner is vLLM's default on GPUs and leans on Triton, which has no compiler for CPUs here:
its interpreter stands in. Asynchronous scheduling, which vLLM turns off on CPUs, is turned on.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

# Before Triton and vLLM are imported.
if __name__ == "__main__":
    # The engine runs in this very process, where its scheduler can be watched.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(sys.argv[1] != "v1"))
    if sys.argv[1] != "v1":
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.backends import backends

        # vLLM asks whether there is one, and nothing else of it where kernels are interpreted.
        backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))

from vllm import LLM
from vllm.platforms.cpu import CpuPlatform

from server.engine.facts import model_facts
from server.engine.payload import KEY, Report
from server.engine.reports import listen
from server.engine.startup import CPU_WORKER, SCHEDULER
from tests.integration.sharded import CALIBRATORS, COUPLED, FAULTS, REQUESTS, generate, request

# Of the tokens that a request writes, the one that is made its end.
STOP = 3


def asynchronous() -> None:
    """Have vLLM schedule a step before the one before it has answered."""
    checked = CpuPlatform.check_and_update_config.__func__

    def turned_on(platform: Any, config: Any) -> None:
        checked(platform, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(turned_on)


def stopped(llm: LLM, known: dict[str, Any], reports: dict[str, Report]) -> dict[str, Any]:
    """Requests again, each ended by a token that it is known to write."""
    facts = model_facts(llm.llm_engine.vllm_config)
    results = {}
    for seed, (name, (length, calibration)) in enumerate(REQUESTS.items()):
        prompt, params = request(name, seed, length, calibration, facts)
        params.stop_token_ids = [known[name]["tokens"][STOP]]
        (output,) = llm.generate([prompt], [params], use_tqdm=False)
        results[name] = {
            "tokens": list(output.outputs[0].token_ids),
            "completion_tokens": reports[name].tallies[0].completion_tokens,
        }
    return results


def run(runner: str, model: str) -> dict[str, Any]:
    """Results by batch and name, and how the engine came to them."""
    if runner == "v2-async":
        asynchronous()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=192,
        max_num_batched_tokens=160,
        max_num_seqs=16,
        block_size=32,
        kv_cache_memory_bytes=1 << 27,
        # Less than the requests of a batch need together.
        num_gpu_blocks_override=14,
        worker_cls=CPU_WORKER,
        scheduler_cls=SCHEDULER,
        additional_config={KEY: {"calibrators": CALIBRATORS}},
    )
    core = llm.llm_engine.engine_core.engine_core
    reports: dict[str, Report] = {}
    listen(llm.llm_engine, lambda report, _: reports.update({report.ticket: report}))
    preempted: list[str] = []
    preempt = core.scheduler._preempt_request

    def counted(request: Any, *args: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **options)

    core.scheduler._preempt_request = counted
    neighbours = {name: REQUESTS[name] for name in ("mild", "second rank")}
    batches = {"calibrated": REQUESTS, "again": REQUESTS, "coupled": {**COUPLED, **neighbours}}
    batches["plain"] = {name: (length, None) for name, (length, _) in REQUESTS.items()}
    batches |= {f"beside {name}": {name: fault, **neighbours} for name, fault in FAULTS.items()}
    results = {name: generate(llm, batch, reports) for name, batch in batches.items()}
    worker = core.model_executor.driver_worker.worker
    return {
        "batches": results,
        "stopped": stopped(llm, results["calibrated"], reports),
        "preempted": len(preempted),
        "runner": type(worker.model_runner).__module__,
        "scheduler": type(core.scheduler).__name__,
        "concurrent": llm.llm_engine.vllm_config.max_concurrent_batches,
    }


if __name__ == "__main__":
    _, runner, out, model = sys.argv
    with open(out, "w") as file:
        json.dump(run(runner, model), file)
