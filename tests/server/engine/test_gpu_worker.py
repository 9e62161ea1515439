"""The GPU worker's own part, over a stock worker that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from server.engine.calibrating import Calibrating
from server.engine.gpu_room import Largest, Method
from server.engine.gpu_worker import CalibratedGPUWorker


@pytest.fixture
def worker():
    """A worker whose configuration is all there is of it."""
    made = object.__new__(CalibratedGPUWorker)
    made.device = torch.device("cpu")
    made.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: 4,
            get_num_kv_heads=lambda parallel: 2,
            get_num_layers=lambda parallel: 3,
            get_head_size=lambda: 16,
        ),
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=10, max_num_seqs=5),
        additional_config={"trimtab": {"calibrators": ["zerotuning"]}},
    )
    return made


def test_room_for_the_largest_step_is_taken_while_memory_is_profiled(worker, monkeypatch):
    largest = Largest(rows=10, slots=5, layers=3, query_heads=4, kv_heads=2, head_dim=16)
    assert worker.room() == largest.room([Method(pools=1, parameters=1)])
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
    assert taken == [worker.room()]
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
