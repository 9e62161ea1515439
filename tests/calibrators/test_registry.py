from importlib.metadata import EntryPoint

import pytest
from pydantic import BaseModel, ConfigDict

from calibrators import registry
from calibrators.capabilities import across_heads, chooses_heads
from calibrators.registry import BUILT_IN, GROUP, Registry, RegistryError
from calibrators.settings import CalibrationSettings
from calibrators.zerotuning import ZeroTuning


class Relaxed(CalibrationSettings):
    model_config = ConfigDict(extra="ignore")


class Coercing(CalibrationSettings):
    model_config = ConfigDict(strict=False)


class Infinite(CalibrationSettings):
    model_config = ConfigDict(allow_inf_nan=True)


@pytest.fixture
def provide(monkeypatch):
    """Replace what installed packages provide by `(name, value)` pairs."""

    def install(*pairs):
        entries = [EntryPoint(name, value, GROUP) for name, value in pairs]

        def entry_points(*, group, name=None):
            return [e for e in entries if e.group == group and name in (None, e.name)]

        monkeypatch.setattr(registry, "entry_points", entry_points)

    return install


def test_built_ins_come_through_their_entry_points():
    loaded = registry.load()
    assert tuple(loaded) == BUILT_IN
    assert isinstance(loaded["zerotuning"], ZeroTuning)
    assert (len(loaded), loaded.get("another")) == (len(BUILT_IN), None)


def test_order_of_registration_is_kept(make_calibrator):
    names = ["b", "a", "c"]
    assert list(Registry(make_calibrator(name) for name in names)) == names


def test_a_name_is_taken_once(make_calibrator):
    with pytest.raises(RegistryError, match=r"'twice' of .*\.Fake is taken by .*\.Fake"):
        Registry([make_calibrator("twice"), make_calibrator("twice")])


def test_what_is_missing_is_listed(make_calibrator):
    complete = make_calibrator()
    parts = {n: getattr(type(complete), n) for n in ("name", "title", "Settings", "bind", "rows")}
    incomplete = type("Incomplete", (), parts)()
    with pytest.raises(RegistryError) as caught:
        Registry([incomplete])
    for absent in ("coefficients", "resolve", "observe", "prefill", "pools", "causal"):
        assert absent in str(caught.value)
    assert "bind" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a b", "a.b", "a" * 65, 'a"', "a\n"])
def test_names_are_plain_words(make_calibrator, name):
    with pytest.raises(RegistryError, match="must match"):
        Registry([make_calibrator(name)])


@pytest.mark.parametrize("capability", [across_heads, chooses_heads])
@pytest.mark.parametrize("declared", [True, False])
def test_capabilities_may_be_declared(make_calibrator, capability, declared):
    calibrator = make_calibrator(**{capability.__name__: declared})
    assert capability(Registry([calibrator])["scale"]) is declared


@pytest.mark.parametrize("capability", ["across_heads", "chooses_heads"])
@pytest.mark.parametrize("declared", [None, 1, "no", lambda self: True])
def test_they_are_declared_clearly(make_calibrator, capability, declared):
    with pytest.raises(RegistryError, match=rf"Fake\.{capability} must be True or False"):
        Registry([make_calibrator(**{capability: declared})])


@pytest.mark.parametrize("settings", [Relaxed, Coercing, Infinite])
def test_settings_stay_strict(make_calibrator, settings):
    with pytest.raises(RegistryError, match="must stay strict"):
        Registry([make_calibrator(Settings=settings)])


@pytest.mark.parametrize("settings", [BaseModel, dict, None, "Settings"])
def test_settings_are_of_our_kind(make_calibrator, settings):
    with pytest.raises(RegistryError, match="must subclass CalibrationSettings"):
        Registry([make_calibrator(Settings=settings)])


def test_a_name_nobody_provides_lists_what_is_installed(provide):
    provide(("zerotuning", "calibrators.zerotuning:ZeroTuning"), ("other", "some:Other"))
    with pytest.raises(RegistryError, match="'missing'; installed: other, zerotuning"):
        registry.load(["missing"])


def test_nothing_installed(provide):
    provide()
    with pytest.raises(RegistryError, match="installed: none"):
        registry.load(["zerotuning"])


def test_two_providers_of_a_name_are_refused(provide):
    provide(
        ("zerotuning", "calibrators.zerotuning:ZeroTuning"),
        ("zerotuning", "impostor:ZeroTuning"),
    )
    with pytest.raises(RegistryError, match=r"provided by calibrators.* and impostor"):
        registry.load(["zerotuning"])


def test_one_provider_seen_twice_is_one(provide):
    provide(*[("zerotuning", "calibrators.zerotuning:ZeroTuning")] * 2)
    assert list(registry.load(["zerotuning"])) == ["zerotuning"]


@pytest.mark.parametrize(
    "value",
    [
        "no_such_module_anywhere:Calibrator",
        "calibrators.zerotuning:NoSuchClass",
        "calibrators.canonical:canonical_json",
    ],
)
def test_a_provider_that_does_not_load_stops_everything(provide, value):
    provide(("broken", value))
    with pytest.raises(RegistryError, match=r"'broken'.* cannot be loaded"):
        registry.load(["broken"])


def test_only_named_providers_are_imported(provide):
    provide(
        ("zerotuning", "calibrators.zerotuning:ZeroTuning"),
        ("broken", "no_such_module_anywhere:Calibrator"),
    )
    assert list(registry.load(["zerotuning"])) == ["zerotuning"]


def test_a_provider_goes_by_its_own_name(provide):
    provide(("alias", "calibrators.zerotuning:ZeroTuning"))
    with pytest.raises(RegistryError, match=r"entry point 'alias' .* provides 'zerotuning'"):
        registry.load(["alias"])
