"""The GPU worker's own part, over a stock worker that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from server.engine.calibrating import Calibrating
from server.engine.gpu_worker import CalibratedGPUWorker


@pytest.fixture
def worker():
    """A worker whose configuration is all there is of it."""
    made = object.__new__(CalibratedGPUWorker)
    made.device = torch.device("cpu")
    made.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: 4, get_head_size=lambda: 16
        ),
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=10),
        additional_config={"trimtab": {"calibrators": ["zerotuning"]}},
    )
    return made


def test_room_for_the_largest_step_is_taken_while_memory_is_profiled(worker, monkeypatch):
    # A pool, its weights and the rest; a value of 16, a peak and a total each; twice.
    assert worker.scratch_bytes() == 2 * 10 * 4 * 3 * 18 * 4
    taken, ran = [], []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kw: taken.append(size) or empty(size, **kw))

    class Runner:
        def profile_run(self, **options):
            ran.append(options)

    worker.model_runner = Runner()

    def profile(self):
        self.model_runner.profile_run(randomize_inputs=False)
        return 123

    monkeypatch.setattr(Worker, "determine_available_memory", profile)
    assert worker.determine_available_memory() == 123
    assert taken == [worker.scratch_bytes()]
    assert ran == [{"randomize_inputs": False}]
    assert not vars(worker.model_runner)


def test_calibrated_steps_are_kept_out_of_full_graphs(worker, monkeypatch):
    asked = []
    stock = lambda num_tokens, invalid_modes: asked.append(invalid_modes)  # noqa: E731
    worker.model_runner = SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(dispatch=stock))
    monkeypatch.setattr(Calibrating, "initialize_from_config", lambda self, config: None)
    worker.initialize_from_config(None)
    dispatch = worker.model_runner.cudagraph_dispatcher.dispatch
    dispatch(num_tokens=1)
    worker.calibration = SimpleNamespace(calibrates=True)
    dispatch(num_tokens=1)
    assert asked == [None, {CUDAGraphMode.FULL}]
