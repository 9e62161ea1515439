"""What calibration costs of a decoding step: measured on a GPU, interpreted elsewhere."""

import pytest
import torch

from benchmarks import gpu_figures, gpu_kernels
from benchmarks.gpu_figures import (
    ALLOWED,
    IMAGE_TOKENS,
    MODEL_OF,
    NETWORKS,
    Share,
    layer_of,
    layers_of,
    pools_of,
    shares,
)
from benchmarks.gpu_kernels import MODELS, Model, Step, calls, inputs, timing
from tests.server.kernels.gpu.kernels import runnable
from tests.server.kernels.gpu.pages import DEVICE

GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
# Figures are promised for GPUs of compute capability 9.0, whose memory is that fast.
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a GPU of compute capability 9.0: H100, H200 or later",
    ),
]
FLOOR = 0.6


@pytest.mark.parametrize("method", ALLOWED)
def test_a_layer_is_calibrated_as_the_engine_does_it(method):
    step = Step(Model(2, 2, 16), requests=2, keys=640, dtype=torch.float32)
    given = inputs(step, DEVICE)
    before = given.output.clone()
    with runnable():
        from server.kernels import gpu

        fields = given.query, given.cache, given.rows, given.heads, given.geometry
        known = gpu.Attention(*fields).log_sum_exp.T.contiguous() * 0.6931471805599453
        layer_of(method, step, given, known)()
    assert torch.isfinite(given.output).all()
    assert (given.output != before).any(-1).all(1).all()


def test_pools_are_of_an_image_with_a_question_behind_it():
    assert pools_of("zerotuning", 2, 4).offsets.tolist() == [[0, 1], [1, 2]]
    var, gift = pools_of("var", 2, 4), pools_of("gift", 2, 4)
    assert var.listed.offsets.diff(dim=1).tolist() == [[8, 1, 568]] * 2
    assert gift.listed.offsets.diff(dim=1).tolist() == [[IMAGE_TOKENS, 32]] * 2
    assert len(gift.weights) == 2 * (IMAGE_TOKENS + 32) and var.weights is None
    assert pools_of("vhr", 2, 4).pools == 0


def test_methods_act_in_the_layers_of_their_defaults():
    found = {name: layers_of(name, NETWORKS[MODEL_OF[name]]) for name in ALLOWED}
    assert found["zerotuning"] == 32 and found["var"] == 29
    assert 0 < found["gift"] < 32 and 0 < found["vhr"] < 32


def test_a_share_is_of_all_layers():
    assert Share("var", "m", layers=4, layer=5.0, step=200.0).of_step == 0.1
    products = NETWORKS["Llama-3.1-8B"].products()
    assert sum(a * b for a, b in products) == 218_103_808


@pytest.mark.skipif(GPU, reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu_figures.main() == 1
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("method", [pytest.param(name, marks=on_hopper) for name in ALLOWED])
def test_a_method_takes_no_more_of_a_step_than_it_may(method, record_property):
    (found,) = shares(DEVICE, [method])
    record_property("share", found.of_step)
    assert found.of_step <= ALLOWED[method], found


@pytest.mark.parametrize(
    ("requests", "keys"),
    [pytest.param(*each, marks=on_hopper) for each in [(64, 2048), (16, 8192)]],
)
@pytest.mark.parametrize("kernel", ["rescale", "partials"])
def test_kernels_that_read_all_keys_come_near_the_bandwidth(
    kernel, requests, keys, record_property
):
    step = Step(MODELS["Llama-3.1-8B"], requests, keys, torch.bfloat16)
    found = timing(*calls(step, DEVICE)[kernel], gpu_kernels.bandwidth(DEVICE))
    record_property("of_floor", found.of_floor)
    assert found.of_floor >= FLOOR, found


@pytest.mark.parametrize("command", [pytest.param(gpu_figures.main, marks=on_gpu)])
def test_shares_are_printed(command, capsys):
    assert command() in (0, 1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ALLOWED)
