"""Strict request models, and the choice of layers and heads that all methods share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from calibrators.interface import CalibrationError, Json, ModelFacts

# Longer than any model is deep or wide; a bound on what one request can make us check.
MAX_INDICES = 1024
MAX_NAME = 128
DECIMAL = re.compile(r"0|[1-9][0-9]{0,5}")


Name: TypeAlias = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9._-]*$", max_length=MAX_NAME)]
"""Name of a profile or a preset."""


class CalibrationSettings(BaseModel):
    """Base of every method's request object: no unknown fields, no coercion, finite floats."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    method: str
    """Name of the calibrator."""
    # Left out of what is dumped: a profile supplies parameters and is none.
    profile: Name | None = Field(default=None, exclude=True)
    """Name of a profile that supplies the parameters left out here."""


def _distinct(indices: list[int]) -> list[int]:
    if len(set(indices)) != len(indices):
        raise ValueError("indices must be distinct")
    return sorted(indices)


def _decimal_key(key: object) -> object:
    """JSON has only string keys; `"3"` means layer 3, anything else stays and is refused.

    `"03"` too: two spellings of one layer would hide each other.
    """
    return int(key) if isinstance(key, str) and DECIMAL.fullmatch(key) else key


Index: TypeAlias = Annotated[int, Field(ge=0)]
Indices: TypeAlias = Annotated[
    list[Index], Field(min_length=1, max_length=MAX_INDICES), AfterValidator(_distinct)
]
LayerKey: TypeAlias = Annotated[Index, BeforeValidator(_decimal_key)]
HeadsByLayer: TypeAlias = Annotated[
    dict[LayerKey, Indices], Field(min_length=1, max_length=MAX_INDICES)
]

Layers: TypeAlias = Literal["all"] | Indices
"""`"all"` or a list of distinct 0-based layers."""
Heads: TypeAlias = Literal["all"] | Indices | HeadsByLayer
"""`"all"`, distinct query heads used in every selected layer, or `{layer: [heads]}`."""

Selection: TypeAlias = dict[int, tuple[int, ...]]
"""Selected query heads by layer, both ascending."""


def select(layers: Layers, heads: Heads, facts: ModelFacts) -> Selection:
    """Resolve a choice of layers and heads against a model.

    Raises:
        CalibrationError: on `layers` or `heads`, where the model has not got one of them or
            `heads` names a layer that `layers` leaves out.
    """
    chosen = select_layers(layers, facts)
    if isinstance(heads, Mapping):
        return _select_by_layer(chosen, heads, facts)
    shared = list(range(facts.query_heads)) if heads == "all" else list(heads)
    check_range("heads", shared, facts.query_heads, "query heads")
    return {layer: tuple(shared) for layer in chosen}


def select_layers(layers: Layers, facts: ModelFacts) -> list[int]:
    """The chosen layers, ascending.

    Raises:
        CalibrationError: on `layers`, where the model has not got one of them.
    """
    chosen = list(range(facts.layers)) if layers == "all" else list(layers)
    check_range("layers", chosen, facts.layers, "layers")
    return chosen


def _select_by_layer(
    layers: Sequence[int], heads: Mapping[int, list[int]], facts: ModelFacts
) -> Selection:
    check_range("heads", list(heads), facts.layers, "layers")
    stray = sorted(set(heads) - set(layers))
    if stray:
        raise CalibrationError(
            "heads", f"heads names layer {stray[0]}, which layers leaves out; name it in both"
        )
    for layer, chosen in heads.items():
        check_range("heads", chosen, facts.query_heads, f"query heads (in layer {layer})")
    return {layer: tuple(heads[layer]) for layer in sorted(heads)}


def check_range(param: str, indices: Iterable[int], limit: int, noun: str) -> None:
    """Refuse indices that are not below `limit`, the number of `noun` of the model.

    Raises:
        CalibrationError: on `param`, for the first of them.
    """
    for index in indices:
        if index >= limit:
            raise CalibrationError(
                param,
                f"{param} has index {index}, but the model has {limit} {noun}: "
                f"0 to {limit - 1} are allowed",
            )


def normal_form(selection: Selection, facts: ModelFacts) -> dict[str, Json]:
    """`layers` and `heads` in the one shortest form that equal selections share."""
    layers = sorted(selection)
    everywhere = set(selection.values())
    return {
        "layers": layers_form(layers, facts),
        "heads": _shared_heads(selection[layers[0]], facts)
        if len(everywhere) == 1
        else {str(layer): [*selection[layer]] for layer in layers},
    }


def layers_form(layers: Sequence[int], facts: ModelFacts) -> Json:
    """Ascending layers as `normal_form` has them."""
    return "all" if len(layers) == facts.layers else [*layers]


def _shared_heads(heads: tuple[int, ...], facts: ModelFacts) -> Json:
    return "all" if len(heads) == facts.query_heads else [*heads]


def selected_layers(params: Mapping[str, Json], facts: ModelFacts) -> list[int]:
    """Layers that `layers_form` or `normal_form` holds, ascending."""
    layers = params["layers"]
    if not isinstance(layers, list):
        return list(range(facts.layers))
    return [layer for layer in layers if isinstance(layer, int)]


def selected_heads(params: Mapping[str, Json], layer: int, facts: ModelFacts) -> list[int]:
    """Query heads that `normal_form` selected in a layer; empty where it is left alone."""
    layers, heads = params["layers"], params["heads"]
    if isinstance(layers, list) and layer not in layers:
        return []
    if isinstance(heads, dict):
        chosen = heads.get(str(layer), [])
    else:
        chosen = heads if isinstance(heads, list) else list(range(facts.query_heads))
    return [head for head in chosen if isinstance(head, int)] if isinstance(chosen, list) else []
