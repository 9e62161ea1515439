"""Keys from flags, the environment and a file."""

from __future__ import annotations

from argparse import Namespace

import pytest

from server.keys import KeyFileError, configured, read
from server.settings import Settings


@pytest.fixture
def file(tmp_path):
    def make(content):
        path = tmp_path / "keys"
        path.write_bytes(content)
        return str(path)

    return make


def test_a_line_is_a_key(file):
    content = b"# comment\n\n  one  \r\ntwo#2\n   # indented\nschl\xc3\xbcssel"
    assert read(file(content)) == ["one", "two#2", "schlüssel"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no key"),
        (b"# only\n\n", "holds no key"),
        (b"one two\n", "spaces"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(file, content, said):
    with pytest.raises(KeyFileError, match=said) as caught:
        read(file(content))
    assert "one" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(KeyFileError, match="No such file"):
        read(str(tmp_path / "keys"))


def test_all_sources_add_up(file, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "environment")
    settings = Settings(api_key_file=file(b"one\ntwo\none\n"))
    assert configured(Namespace(), settings) == ("environment", "one", "two")
    given = Namespace(api_key=["flag", "two"])
    assert configured(given, settings) == ("flag", "two", "one")
    assert configured(given, Settings()) == ("flag", "two")


def test_there_may_be_none(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert configured(Namespace(api_key=None), Settings()) == ()
