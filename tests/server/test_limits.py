"""The table of limits, and its flags."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields

import pytest

from server.flags import PREFIX
from server.limits import Limits, add_limit_flags, flag_of, table

NAMES = [each.name for each in fields(Limits)]


def parse(*argv, **environment):
    parser = ArgumentParser(prog="test")
    add_limit_flags(parser, {PREFIX + name.upper(): value for name, value in environment.items()})
    return Limits.from_args(parser.parse_args(argv))


def test_without_flags_the_defaults_hold():
    assert parse() == Limits() == Limits.from_args(Namespace(port=8000))


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_is_a_flag_and_a_variable(name):
    assert getattr(parse(f"{flag_of(name)}=7"), name) == 7
    assert getattr(parse(**{name: "7"}), name) == 7
    assert f"`{flag_of(name)}`" in table()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "many", "1e400"])
@pytest.mark.parametrize("name", NAMES)
def test_no_limit_is_switched_off_by_accident(capsys, name, text):
    with pytest.raises(SystemExit):
        parse(f"{flag_of(name)}={text}")
    assert f"argument {flag_of(name)}: not a positive" in capsys.readouterr().err


def test_times_may_be_fractions():
    assert parse("--header-timeout=0.5").header_timeout == 0.5


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_n has to be positive"):
        Limits(max_n=0)
