"""Which calibrations are measured where none is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.evaluation.api import Api, Calibration, member


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A calibrator that is not measured, and why."""

    calibrator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Offer:
    """The calibrators of a server, as `GET /v1/calibrators` describes them."""

    entries: Sequence[Mapping[str, Any]]

    @classmethod
    async def of(cls, api: Api) -> Offer:
        """Ask the server."""
        return cls(member(await api.get("/v1/calibrators"), "data"))

    @property
    def pictures(self) -> bool:
        """Whether the model takes them, as far as methods that need them tell."""
        return any(entry["modality"] == "vision" and entry["available"] for entry in self.entries)

    def usual(self, *, pictures: bool) -> tuple[list[Calibration], list[LeftOut]]:
        """What can be asked for by name alone, and what cannot be asked for at all.

        Args:
            pictures: whether prompts have some.
        """
        chosen: list[Calibration] = []
        left_out: list[LeftOut] = []
        for entry in self.entries:
            reason = entry["unavailable_reason"]
            if reason is None and entry["modality"] == "vision" and not pictures:
                reason = "needs pictures, and prompts are text"
            if reason is None:
                chosen.append(_calibration(entry))
            else:
                left_out.append(LeftOut(entry["id"], reason))
        return chosen, left_out


def _calibration(entry: Mapping[str, Any]) -> Calibration:
    """Its name, with an example for each parameter that has no default."""
    properties = entry["params_schema"].get("properties", {})
    examples = {
        name: field["examples"][0]
        for name, field in properties.items()
        if field.get("examples") and entry["defaults"].get(name) is None
    }
    return {"method": entry["id"], **examples} if examples else entry["id"]
