"""Measurements of a search in a file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from server.profiling.questions import Values
from server.profiling.search import Candidate

FORMAT = 1

Header: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, str, str]


class StateError(Exception):
    """A file that this search cannot go on from; says why."""


class State:
    """What was measured: by what was asked, calibration and sample.

    Args:
        measured: so far.
        file: that takes a line per measurement.
    """

    def __init__(self, measured: dict[Key, Values], file: IO[str]) -> None:
        self._measured = measured
        self._file = file

    def __len__(self) -> int:
        return len(self._measured)

    def get(self, asked: str, candidate: Candidate, sample: str) -> Values | None:
        """What was measured, None where it was not."""
        return self._measured.get(_key(asked, candidate.calibration, sample))

    def add(self, asked: str, candidate: Candidate, sample: str, values: Values) -> None:
        """Keep a measurement. It is in the file when this returns."""
        self._measured[_key(asked, candidate.calibration, sample)] = values
        line = {
            "asked": asked,
            "calibration": candidate.calibration,
            "sample": sample,
            "values": values,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@contextmanager
def opened(path: Path, header: Header) -> Iterator[State]:
    """The state in a file, begun there or gone on with.

    Args:
        path: of the file.
        header: data, model and settings that measurements depend on.

    Raises:
        StateError: the file is of another search, in use, or cannot be read or written.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"{path}: another search is using it") from None
        yield State(_begun(file, path, _canonical({"format": FORMAT, **header})), file)


def _begun(file: IO[str], path: Path, header: Header) -> dict[Key, Values]:
    lines = _whole_lines(file, path)
    if not lines:
        file.write(json.dumps(header) + "\n")
        file.flush()
        return {}
    first, *others = [_parsed(line, path, number) for number, line in enumerate(lines, 1)]
    _check(path, first, header)
    try:
        return {_key(m["asked"], m["calibration"], m["sample"]): m["values"] for m in others}
    except (KeyError, TypeError):
        raise StateError(f"{path}: a line is no measurement") from None


def _whole_lines(file: IO[str], path: Path) -> list[str]:
    """Lines of the file; one that was cut off while it was written is dropped."""
    file.seek(0)
    try:
        text = file.read()
    except UnicodeDecodeError:
        raise StateError(f"{path}: not UTF-8") from None
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.truncate(len(whole.encode()))
    return whole.splitlines()


def _parsed(line: str, path: Path, number: int) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(line)
    except ValueError:
        raise StateError(f"{path}:{number}: not JSON") from None


def _check(path: Path, found: object, header: Header) -> None:
    if not isinstance(found, dict):
        raise StateError(f"{path}: the first line says not what it was measured with")
    for name in (*header, *found):
        if found.get(name) != header.get(name):
            raise StateError(
                f"{path} is of a search with another {name}: {json.dumps(found.get(name))} there, "
                f"{json.dumps(header.get(name))} here; name another --state, or remove it"
            )


def _key(asked: str, calibration: Mapping[str, Any] | None, sample: str) -> Key:
    return asked, json.dumps(calibration, sort_keys=True), sample


def _canonical(header: Header) -> Header:
    """As it would be read: tuples are lists."""
    read: Header = json.loads(json.dumps(header))
    return read
