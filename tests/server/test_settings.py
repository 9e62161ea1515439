from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from calibrators.registry import BUILT_IN
from server.settings import PREFIX, SALT_KEY, Settings, add_flags, share_salt_key


def parse(*argv, **environment):
    parser = ArgumentParser(prog="test")
    add_flags(parser, {PREFIX + name.upper(): value for name, value in environment.items()})
    return Settings.from_args(parser.parse_args(argv))


def test_defaults(monkeypatch):
    monkeypatch.delenv(SALT_KEY, raising=False)
    settings = parse()
    assert settings.calibrators == BUILT_IN
    assert settings.default_calibration is None
    assert (settings.calibration_profiles, settings.calibration_presets) == (None, None)
    assert settings.max_calibrations_per_request == 2
    assert settings.allow_untested_vllm is False


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("calibrators", "zerotuning", ("zerotuning",)),
        ("calibrators", " b, a ,b,", ("b", "a")),
        ("calibrators", "", ()),
        ("default_calibration", '{"method": "m", "gamma": 0.5}', {"method": "m", "gamma": 0.5}),
        ("default_calibration", '["a", "b"]', ["a", "b"]),
        ("default_calibration", '"zerotuning"', "zerotuning"),
        ("default_calibration", "none", "none"),
        ("default_calibration", "my-preset.2", "my-preset.2"),
        ("calibration_profiles", "some/folder", Path("some/folder")),
        ("calibration_presets", "presets.toml", Path("presets.toml")),
        ("default_calibration", "null", None),
        ("max_calibrations_per_request", "3", 3),
        ("allow_untested_vllm", "true", True),
        ("allow_untested_vllm", "False", False),
    ],
)
def test_flags_and_environment_say_the_same(name, text, value):
    flag = "--" + name.replace("_", "-")
    assert getattr(parse(f"{flag}={text}"), name) == value
    assert getattr(parse(**{name: text}), name) == value


def test_a_flag_wins_over_the_environment():
    settings = parse("--max-calibrations-per-request", "5", max_calibrations_per_request="4")
    assert settings.max_calibrations_per_request == 5


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("default_calibration", "{method", "not JSON: '{method'"),
        ("default_calibration", "zero tuning", "not JSON"),
        ("calibration_profiles", "", "a path is needed"),
        ("max_calibrations_per_request", "0", "not a positive whole number"),
        ("max_calibrations_per_request", "-1", "not a positive whole number"),
        ("max_calibrations_per_request", "1.5", "not a positive whole number"),
        ("max_calibrations_per_request", "²", "not a positive whole number"),
        ("allow_untested_vllm", "yes", "true or false"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_bad_values_name_their_flag(capsys, name, text, said, source):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit) as caught:
        parse(f"{flag}={text}") if source == "flag" else parse(**{name: text})
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"argument {flag}: " in error
    assert said in error


def test_help_names_the_environment_variables():
    parser = ArgumentParser(prog="test")
    add_flags(parser, {})
    text = parser.format_help()
    for name in ("CALIBRATORS", "DEFAULT_CALIBRATION", "MAX_CALIBRATIONS_PER_REQUEST"):
        assert PREFIX + name in text


def test_arguments_that_are_not_ours_do_no_harm():
    settings = Settings.from_args(Namespace(port=8000, calibrators=("a",)))
    assert (settings.calibrators, settings.max_calibrations_per_request) == (("a",), 2)


def test_the_salt_key_is_random_unless_it_is_given(monkeypatch):
    monkeypatch.delenv(SALT_KEY, raising=False)
    first, second = parse().salt_key, parse().salt_key
    assert first != second
    assert len(first) == len(second) == 64
    monkeypatch.setenv(SALT_KEY, "configured")
    assert parse().salt_key == "configured"


def test_a_shared_salt_key_is_drawn_once(monkeypatch):
    monkeypatch.setenv(SALT_KEY, "")
    share_salt_key()
    keys = {parse().salt_key, parse().salt_key}
    share_salt_key()
    keys.add(parse().salt_key)
    assert len(keys) == 1
    assert len(keys.pop()) == 64


def test_a_configured_salt_key_is_the_one_shared(monkeypatch):
    monkeypatch.setenv(SALT_KEY, "configured")
    share_salt_key()
    assert parse().salt_key == "configured"
