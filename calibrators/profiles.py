"""Profiles: parameters found for one model and one purpose, kept in a file.

A profile supplies what a request leaves out. One JSON file holds one profile and is named after it;
`docs/profiles.md` shows one. Files are as strict as requests: an unknown field, a wrong type, a
number that is not finite or a key that comes twice is an error that names the field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, NoReturn, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from calibrators.interface import ModelFacts
from calibrators.settings import MAX_INDICES, CalibrationSettings, LayerKey, Name

FORMAT = 1
SUFFIX = ".json"
# Of free objects; what answers them over HTTP goes deeper into the stack than what reads them.
MAX_DEPTH = 20
# Digits of a configuration's hash in messages.
SHOWN = 12


class ProfileError(Exception):
    """A profile that cannot be used.

    Args:
        file: name of the file, without its folder.
        field: dotted path of the offending field, empty for the file as a whole.
        message: the rule, the value and what is allowed.
    """

    def __init__(self, file: str, field: str, message: str) -> None:
        super().__init__(": ".join(part for part in (file, field, message) if part))
        self.file = file
        self.field = field
        self.message = message


def _iso(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("a date is written YYYY-MM-DD")
    return text


def _shallow(content: dict[str, JsonValue]) -> dict[str, JsonValue]:
    level: list[JsonValue] = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return content


Free: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_shallow)]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
Hash: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
IsoDate: TypeAlias = Annotated[str, AfterValidator(_iso)]
ByHead: TypeAlias = Annotated[dict[LayerKey, float], Field(min_length=1, max_length=MAX_INDICES)]
ByLayer: TypeAlias = Annotated[dict[LayerKey, ByHead], Field(min_length=1, max_length=MAX_INDICES)]


class _Record(BaseModel):
    model_config = ConfigDict(**CalibrationSettings.model_config)


class ModelIdentity(_Record):
    """The model that a profile is for: its architecture, whatever its weights, name or type."""

    config_hash: Hash
    """SHA-256 over what defines the architecture, 64 hex digits."""
    architecture: Text
    """Hugging Face name, such as LlamaForCausalLM."""
    layers: Annotated[int, Field(ge=1)]
    """Decoder layers."""
    query_heads: Annotated[int, Field(ge=1)]
    """Query heads of a layer."""

    @classmethod
    def of(cls, facts: ModelFacts) -> ModelIdentity:
        """Identity of a model whose hash is known.

        Raises:
            ValidationError: it is not.
        """
        return cls(
            config_hash=facts.config_hash,
            architecture=facts.architecture,
            layers=facts.layers,
            query_heads=facts.query_heads,
        )

    def __str__(self) -> str:
        return described(self.architecture, self.layers, self.query_heads, self.config_hash)


class Estimate(_Record):
    """A measured value with its confidence interval."""

    value: float
    """The estimate."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @model_validator(mode="after")
    def _in_order(self) -> Estimate:
        if not self.low <= self.value <= self.high:
            raise ValueError("low <= value <= high must hold")
        return self


class Data(_Record):
    """The data a profile was found with."""

    name: Text
    """What people call it."""
    sha256: Hash
    """Of the file, 64 hex digits."""


class Split(_Record):
    """How the data was parted into samples to search with and samples to report on."""

    seed: Annotated[int, Field(ge=0)]
    """Of the draw."""
    search: Annotated[int, Field(ge=0)]
    """Samples that parameters were chosen on."""
    report: Annotated[int, Field(ge=1)]
    """Samples that baseline and result were measured on, none of them searched."""


class Provenance(_Record):
    """Where a profile comes from."""

    data: Data
    split: Split
    metric: Text
    """What was measured, such as accuracy."""
    baseline: Estimate
    """Without calibration, on the report samples."""
    result: Estimate
    """With this profile, on the same samples."""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    """Level of both intervals, such as 0.95."""
    date: IsoDate
    """Day of the measurement, YYYY-MM-DD."""
    trimtab: Text
    """Version that measured."""
    search: Free
    """How parameters were chosen, in whatever form suits the search."""


class Profile(_Record):
    """Parameters of one method for one model."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    """Version of this form, 1."""
    name: Name
    """The file's name without `.json`."""
    model: ModelIdentity
    method: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of the calibrator."""
    parameters: Free
    """Fields of the method's request object; null as if left out."""
    strengths: ByLayer | None = None
    """One value per {layer: {head: value}}, for methods that take a strength by head."""
    provenance: Provenance

    @model_validator(mode="after")
    def _one_source(self) -> Profile:
        own = {"method", "profile", "strengths"}
        if self.strengths is not None:
            own |= {"layers", "heads"}  # which strengths name themselves
        doubled = sorted(own & self.parameters.keys())
        if doubled:
            raise ValueError(f"parameters must leave out {doubled[0]}, which is given elsewhere")
        return self

    @property
    def file(self) -> str:
        """Name of the file that holds this profile."""
        return self.name + SUFFIX

    def check_model(self, facts: ModelFacts) -> None:
        """Refuse a model that this profile was not made for.

        Raises:
            ProfileError: names both models.
        """
        served = (facts.config_hash, facts.architecture, facts.layers, facts.query_heads)
        mine = self.model
        if (mine.config_hash, mine.architecture, mine.layers, mine.query_heads) == served:
            return
        theirs = described(facts.architecture, facts.layers, facts.query_heads, facts.config_hash)
        raise ProfileError(self.file, "model", f"it is for {mine}, and the model is {theirs}")

    def settings(
        self, given: Mapping[str, object], alternatives: Sequence[Sequence[str]] = ()
    ) -> dict[str, object]:
        """The settings that a request makes together with this profile.

        What a request gives wins; null gives nothing. A choice of layers and heads is one: heads by
        layer replace the profile's layers, and layers narrow the profile's heads by layer.

        Args:
            given: the request object.
            alternatives: groups of parameters that exclude one another.
        """
        explicit = {name: value for name, value in given.items() if value is not None}
        for naming in ("method", "profile"):
            explicit.pop(naming, None)
        named = [group for group in alternatives if not explicit.keys().isdisjoint(group)]
        replaced = {name for group in named for name in group}
        own: dict[str, object] = {
            name: value
            for name, value in self.parameters.items()
            if value is not None and name not in replaced
        }
        _narrow(own, explicit)
        if self.strengths is not None:
            own["strengths"] = self.strengths
        return {"method": self.method, **own, **explicit}


def _narrow(own: dict[str, object], explicit: Mapping[str, object]) -> None:
    layers, heads = explicit.get("layers"), own.get("heads")
    if isinstance(explicit.get("heads"), dict) and layers is None:
        own.pop("layers", None)
    elif isinstance(layers, list) and isinstance(heads, dict):
        wanted = set(map(str, layers))
        kept = {layer: chosen for layer, chosen in heads.items() if layer in wanted}
        # Where none is left, what the profile has says in the error which there are.
        own["heads"] = kept or heads


def described(architecture: str, layers: int, query_heads: int, config_hash: str) -> str:
    """A model in words, for messages."""
    shown = f"configuration {config_hash[:SHOWN]}" if config_hash else "unknown configuration"
    return f"{architecture} with {layers} layers of {query_heads} query heads ({shown})"


def load(path: Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: the file cannot be read, is no profile, or is not named after it.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_distinct_keys,
        )
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can be escaped
        profile = Profile.model_validate(content)
    except OSError as error:
        raise ProfileError(path.name, "", f"it cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ProfileError(path.name, field, first["msg"].removeprefix("Value error, ")) from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(path.name, "", f"it is not JSON as it should be: {error}") from None
    if path.name != profile.file:
        raise ProfileError(path.name, "name", f"{profile.name} belongs into {profile.file}")
    return profile


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {doubled[:80]!r} comes twice in one object")
    return found


def dump(profile: Profile) -> str:
    """Text of a profile's file: fields in the order of the form, free objects sorted."""
    content = profile.model_dump(mode="json")
    content["parameters"] = _sorted(content["parameters"])
    content["provenance"]["search"] = _sorted(content["provenance"]["search"])
    if profile.strengths is None:
        del content["strengths"]
    else:
        content["strengths"] = {
            str(layer): {str(head): profile.strengths[layer][head] for head in sorted(heads)}
            for layer, heads in sorted(profile.strengths.items())
        }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _sorted(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(each) for each in value] if isinstance(value, list) else value


def save(profile: Profile, path: Path) -> None:
    """Write a profile; a reader finds the old file or the new one, never a part.

    Raises:
        ProfileError: the file is not named after the profile.
        OSError: it cannot be written.
    """
    if path.name != profile.file:
        raise ProfileError(path.name, "name", f"{profile.name} belongs into {profile.file}")
    # Of another suffix, so that nobody takes it for a profile.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(dump(profile))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
