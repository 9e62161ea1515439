"""The example on the page about writing calibrators runs and does what the page says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from calibrators import reference
from calibrators.interface import CalibrationError, Masses, ModelFacts, Prompt
from calibrators.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "calibrators.md"
NAME = "prefixscale"
FACTS = ModelFacts("LlamaForCausalLM", 2, 3, 1, 8, 24, 64)
KEYS = 7


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path_factory.mktemp("page") / f"{NAME}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield Registry([module.PrefixScale()])[NAME]
    del sys.modules[NAME]


@pytest.fixture
def resolve(calibrator):
    def make(layer=0, prompt=KEYS, **settings):
        bound = calibrator.bind(calibrator.Settings(**settings), FACTS)
        return calibrator.resolve(bound, layer, FACTS, Prompt(prompt), {})

    return make


def probabilities():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(KEYS, FACTS.query_heads, FACTS.head_dim, generator=generator)
    key = torch.randn(KEYS, FACTS.kv_heads, FACTS.head_dim, generator=generator)
    geometry = reference.Geometry(scale=1.0)
    return reference.probabilities(query.double(), key.double(), torch.arange(KEYS), geometry)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("length", [1, 4, 64])
def test_coefficients_scale_the_prefix_and_renormalise(calibrator, resolve, factor, length):
    stock = probabilities()
    plan = resolve(factor=factor, length=length)
    (pool,) = plan.pools
    in_pool = torch.isin(torch.arange(KEYS), torch.from_numpy(pool.keys))
    mass = (stock * in_pool).sum(-1)

    got = calibrator.coefficients(
        Masses(mass[..., None], 1 - mass),
        {"factor": torch.from_numpy(plan.parameters["factor"]).expand_as(mass)},
    )
    changed = reference.recombine(stock, [in_pool], [got.pools[..., 0]], got.rest)

    wanted = torch.where(torch.arange(KEYS) < length, stock * factor, stock)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(changed, wanted, rtol=1e-6, atol=1e-9)


def test_the_pool_ends_with_the_prompt(resolve):
    (pool,) = resolve(prompt=3, length=10).pools

    assert pool.keys.tolist() == [0, 1, 2]


def test_layers_and_heads_are_honoured(resolve):
    assert resolve(layer=0, layers=[1]) is None
    assert resolve(layer=1, layers=[1], heads=[2]).heads.tolist() == [False, False, True]


def test_what_the_model_lacks_is_refused(calibrator):
    with pytest.raises(CalibrationError, match="3 query heads"):
        calibrator.bind(calibrator.Settings(heads=[3]), FACTS)


def test_settings_are_strict(calibrator):
    with pytest.raises(ValueError, match="factor"):
        calibrator.Settings(factor="2")
