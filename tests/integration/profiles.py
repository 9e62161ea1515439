"""A profile for the model under test, written as a search would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from calibrators.profiles import FORMAT, ModelIdentity, Profile, save
from server.fingerprint import fingerprint

PROVENANCE = {
    "data": {"name": "none", "sha256": "0" * 64},
    "split": {"seed": 0, "search": 0, "report": 1},
    "metric": "none",
    "baseline": {"value": 0, "low": 0, "high": 0},
    "result": {"value": 0, "low": 0, "high": 0},
    "confidence": 0.95,
    "date": "2026-11-25",
    "trimtab": "0.1.0",
    "search": {},
}


def write_profile(folder: Path, model: Path, name: str, **fields: Any) -> Path:
    """Write a profile of ZeroTuning into `folder`, which is made and returned."""
    config = AutoConfig.from_pretrained(model)
    folder.mkdir(exist_ok=True)
    identity = ModelIdentity(
        config_hash=fingerprint(config, config),
        architecture=config.architectures[0],
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
    )
    content = {"format": FORMAT, "name": name, "method": "zerotuning", "parameters": {}, **fields}
    profile = Profile.model_validate(
        {**content, "model": identity.model_dump(), "provenance": PROVENANCE}
    )
    save(profile, folder / profile.file)
    return folder
