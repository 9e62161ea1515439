"""What a server offers, by its configuration; read at its start and by each of its front ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from calibrators import registry
from calibrators.profiles import ProfileError
from server import presets, profiles
from server.admission import Admission, Refusal
from server.aliases import Alias, aliases
from server.engine.facts import calibrators_of, model_facts, model_identity, step_limit
from server.engine.startup import StartupRefused, check_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig

    from server.settings import Settings

Entry = TypeVar("Entry")


def offer(
    config: VllmConfig, settings: Settings, models: Sequence[str]
) -> tuple[Admission, dict[str, Alias]]:
    """Admission to the served model, and the names that stand for it under a preset.

    Args:
        config: of the engine.
        settings: of this server.
        models: names the model is served under.

    Raises:
        RegistryError: a calibrator cannot be offered.
        StartupRefused: a profile, a preset or the default calibration cannot be honoured.
    """
    try:
        admission = Admission(
            registry.load(calibrators_of(config)),
            model_facts(config),
            model_identity(config),
            profiles=_read(settings.calibration_profiles, profiles.read),
            presets=_read(settings.calibration_presets, presets.read),
            default=settings.default_calibration,
            limit=settings.max_calibrations_per_request,
            step=step_limit(config),
        )
        names = aliases(models, admission.presets)
    except ProfileError as error:
        raise StartupRefused(f"--calibration-profiles: {error}") from None
    except presets.PresetError as error:
        raise StartupRefused(f"--calibration-presets: {error}") from None
    except Refusal as refusal:
        raise StartupRefused(f"--default-calibration: {refusal.message}") from None
    if names:
        check_names()
    return admission, names


def _read(path: Path | None, read: Callable[[Path], dict[str, Entry]]) -> Mapping[str, Entry]:
    return {} if path is None else read(path)
