import json

import pytest
import torch

from benchmarks import gpu_kernels, kernels
from benchmarks.gpu_kernels import MODELS, Model, Step, fits, inputs, lines

GPU = torch.cuda.is_available()
TINY = Step(Model(4, 2, 16), requests=3, keys=20, dtype=torch.float32)


def test_a_step_reads_the_keys_and_values_of_all_its_requests():
    step = Step(MODELS["Llama-3.1-8B"], requests=2, keys=100, dtype=torch.bfloat16)
    assert step.cache_bytes() == 2 * 100 * 8 * 128 * 2 * 2
    assert step.row_bytes() == 2 * 32 * 128 * 2
    assert fits(step, 2 * step.cache_bytes()) and not fits(step, step.cache_bytes())


def test_inputs_are_a_row_per_request_over_pages_of_its_own():
    given = inputs(TINY, torch.device("cpu"))
    assert given.cache.keys.shape == (6, 2, 16, 16)
    assert given.cache.keys.stride() == given.cache.values.stride()
    assert sorted(given.cache.block_table.flatten().tolist()) == list(range(6))
    assert given.rows.position.tolist() == [19] * 3
    assert given.rows.tiles.tolist() == [0, 1, 2, 3]
    assert given.pools.offsets.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_what_was_not_measured_has_no_figure():
    timed = {"median": 2.0, "low": 1.5, "high": 3.0, "bytes": 1, "of_floor": 0.5}
    result = {"model": "m", "requests": 1, "keys": 2, "combine": timed}
    _, (row,) = lines([result])
    assert row == ["m", "1", "2", "-", "-", "-", "-", "2.0 (1.5..3.0) 50%"]


@pytest.mark.skipif(GPU, reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert kernels.main(["--device", "cuda"]) == 1
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_figures_are_written(tmp_path):
    target = tmp_path / "figures.json"
    assert gpu_kernels.main(["--batches", "1", "--contexts", "512", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert {step["model"] for step in found["steps"]} == set(MODELS)
    assert all(step["epilogue"]["median"] > 0 for step in found["steps"])
