"""Labelled samples: read from JSONL, checked line by line, split in two."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.evaluation.answers import normalised

Split: TypeAlias = Literal["search", "report"]
Scoring: TypeAlias = Literal["generate", "logprob"]
Text: TypeAlias = Annotated[str, Field(min_length=1)]


class DataError(Exception):
    """Data that cannot be used; the message names file and line."""


class Message(BaseModel):
    """A chat message; what else it holds is for the server to judge."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Text
    content: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]


class Line(BaseModel):
    """A line of the file, as it is written there."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: Text
    choices: list[Text] | None = None
    labels: list[Text] | None = None
    id: Text | None = None
    split: Split | None = None

    @model_validator(mode="after")
    def _is_one_question(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is needed, and not both")
        self._check_options()
        return self

    def _check_options(self) -> None:
        if (self.choices is None) == (self.labels is None):
            raise ValueError("either choices or labels is needed, and not both")
        options = self.options
        if len(options) < 2:
            raise ValueError("at least two choices are needed")
        if len({normalised(option) for option in options}) < len(options):
            raise ValueError("two of the choices differ in nothing but case or punctuation")
        if not all(map(normalised, options)):
            raise ValueError("a choice has neither letters nor digits")
        if self.answer not in options:
            raise ValueError(f"the answer {self.answer!r} is not among the choices {options}")

    @property
    def options(self) -> list[str]:
        """What there is to choose from, by either name."""
        return self.choices or self.labels or []


class Question(Line):
    """A line that may have neither answer nor choices."""

    answer: Text = ""

    def _check_options(self) -> None:
        if self.answer or self.choices is not None or self.labels is not None:
            super()._check_options()


@dataclass(frozen=True, slots=True)
class Sample:
    """A question with a known answer.

    Attributes:
        id: distinct within the file.
        prompt: text to continue; None where it is a chat.
        messages: chat messages; empty where it is a text.
        choices: possible answers, two at least; empty where the sample is not labelled.
        answer: the right one; empty likewise.
        split: as the file fixes it, None where it does not.
    """

    id: str
    prompt: str | None
    messages: tuple[dict[str, Any], ...]
    choices: tuple[str, ...]
    answer: str
    split: Split | None = None

    @property
    def content(self) -> str:
        """What the model is asked, as a text to compare and hash."""
        return json.dumps([self.prompt, self.messages], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The samples of a file.

    Attributes:
        name: of the file, without its folder.
        sha256: of the file's bytes, hexadecimal.
        scoring: mode the file asks for: `logprob` where it has labels.
        samples: in the order of the file.
    """

    name: str
    sha256: str
    scoring: Scoring
    samples: tuple[Sample, ...]

    @property
    def labelled(self) -> bool:
        """Whether right answers are known."""
        return bool(self.samples[0].answer)

    def part(self, split: Split | Literal["all"], seed: int = 0) -> tuple[Sample, ...]:
        """The samples of a split, in the order of the file.

        Without a fixed split half of the distinct inputs go to each side, drawn by `seed`; equal
        inputs are never on both sides.

        Raises:
            DataError: there are none.
        """
        if split == "all":
            return self.samples
        chosen = tuple(s for s in self.samples if self._side(seed).get(s.content) == split)
        if not chosen:
            raise DataError(f"{self.name}: the split {split!r} has no samples")
        return chosen

    def _side(self, seed: int) -> dict[str, Split]:
        if self.samples[0].split is not None:
            return {s.content: s.split for s in self.samples if s.split is not None}
        contents = sorted({sample.content for sample in self.samples})
        random.Random(seed).shuffle(contents)
        half = len(contents) // 2
        return {c: "search" if i < half else "report" for i, c in enumerate(contents)}


def draw(samples: Sequence[Sample], limit: int | None, seed: int = 0) -> tuple[Sample, ...]:
    """At most `limit` of the samples, drawn by `seed`, in their order."""
    if limit is None or limit >= len(samples):
        return tuple(samples)
    chosen = random.Random(seed).sample(range(len(samples)), limit)
    return tuple(samples[index] for index in sorted(chosen))


def read(file: Path, *, unlabelled: bool = False, images: bool = False) -> Dataset:
    """The data set in a JSONL file.

    Args:
        file: to read.
        unlabelled: lines may lack answer and choices, all of them or none.
        images: lines have to be chats with an image.

    Raises:
        DataError: it cannot be read, a line is wrong, or lines contradict each other.
    """
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: not UTF-8") from None
    numbered = list(_lines(file, text, Question if unlabelled else Line))
    if not numbered:
        raise DataError(f"{file}: no samples")
    _check_uniform(file, numbered)
    if images:
        _check_images(file, numbered)
    samples = tuple(_sample(number, line) for number, line in numbered)
    _check_distinct(file, numbered, samples)
    scoring: Scoring = "logprob" if numbered[0][1].labels else "generate"
    return Dataset(file.name, hashlib.sha256(raw).hexdigest(), scoring, samples)


def _lines(file: Path, text: str, form: type[Line]) -> Iterator[tuple[int, Line]]:
    # Not splitlines(): JSON strings may hold characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, form.model_validate(_parsed(line))
            except ValueError as error:
                raise DataError(f"{file}:{number}: {_reason(error)}") from None


def _parsed(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return members


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _sample(number: int, line: Line) -> Sample:
    return Sample(
        id=line.id if line.id is not None else f"line-{number}",
        prompt=line.prompt,
        messages=tuple(message.model_dump() for message in line.messages or ()),
        choices=tuple(line.options),
        answer=line.answer,
        split=line.split,
    )


def _check_uniform(file: Path, numbered: Sequence[tuple[int, Line]]) -> None:
    _, first = numbered[0]
    for number, line in numbered:
        if bool(line.answer) != bool(first.answer):
            raise DataError(f"{file}:{number}: answers are given on some lines and not on others")
        if (line.labels is None) != (first.labels is None):
            raise DataError(f"{file}:{number}: choices and labels in one file")
        if (line.split is None) != (first.split is None):
            raise DataError(f"{file}:{number}: split is given on some lines and not on others")


def _check_images(file: Path, numbered: Sequence[tuple[int, Line]]) -> None:
    for number, line in numbered:
        if not any(map(_shows, line.messages or ())):
            raise DataError(f"{file}:{number}: no message has a part with an image_url and its url")


def _shows(message: Message) -> bool:
    return not isinstance(message.content, str) and any(
        part.get("type") == "image_url"
        and isinstance(part.get("image_url"), dict)
        and isinstance(part["image_url"].get("url"), str)
        for part in message.content
    )


def _check_distinct(
    file: Path, numbered: Sequence[tuple[int, Line]], samples: Sequence[Sample]
) -> None:
    ids: set[str] = set()
    splits: dict[str, Split | None] = {}
    for (number, _), sample in zip(numbered, samples, strict=True):
        if sample.id in ids:
            raise DataError(f"{file}:{number}: the id {sample.id!r} occurs twice")
        ids.add(sample.id)
        if splits.setdefault(sample.content, sample.split) != sample.split:
            raise DataError(f"{file}:{number}: the same input is in the other split, too")
