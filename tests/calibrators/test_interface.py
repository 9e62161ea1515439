import subprocess
import sys

import pytest

from calibrators.act import ACT
from calibrators.capabilities import (
    across_heads,
    alternatives,
    chooses_heads,
    profile_settings,
    strengths,
)
from calibrators.interface import (
    CalibrationError,
    Calibrator,
    ColumnMeans,
    HeadOutputs,
    ProbabilityBlock,
    ResidualPeaks,
    Span,
)
from calibrators.zerotuning import ZeroTuning


def test_the_contract_loads_without_torch_and_numpy():
    code = (
        "import sys, calibrators.interface\n"
        "print(*{'torch', 'numpy', 'vllm', 'pydantic'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.split() == []


def test_the_built_in_keeps_the_contract():
    assert isinstance(ZeroTuning(), Calibrator)


def test_a_class_without_a_method_does_not(make_calibrator):
    assert isinstance(make_calibrator(), Calibrator)
    assert across_heads(make_calibrator()) is False
    assert chooses_heads(make_calibrator()) is False
    without = type("Without", (), {"name": "without", "bind": lambda *_: None})()
    assert not isinstance(without, Calibrator)


def test_a_calibration_error_names_the_field():
    error = CalibrationError("layers", "too deep")
    assert (error.param, error.message, str(error)) == ("layers", "too deep", "too deep")


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: ColumnMeans(layer),
        lambda layer: ProbabilityBlock(layer, (3, 4), (Span(0, 2),)),
        lambda layer: ResidualPeaks(layer, (1, 2)),
        lambda layer: HeadOutputs(layer, without_images=True),
    ],
)
def test_equal_observations_are_one_key(make):
    measured = {make(3): "first"}
    assert measured[make(3)] == "first"
    assert make(4) not in measured


def test_what_a_class_declares_about_profiles(make_calibrator):
    plain = make_calibrator()
    assert (alternatives(plain), strengths(plain)) == ((), None)
    assert profile_settings(plain) is plain.Settings
    zerotuning = ZeroTuning()
    assert strengths(zerotuning) in zerotuning.Settings.model_fields
    assert profile_settings(zerotuning).model_fields.keys() - zerotuning.Settings.model_fields == {
        "strengths"
    }
    assert {
        name for group in alternatives(ACT()) for name in group
    } <= ACT.Settings.model_fields.keys()
