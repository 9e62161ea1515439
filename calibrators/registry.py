"""Discovery of calibrators through the entry-point group `trimtab.calibrators`.

The built-in methods come through the same door as anybody else's. Third-party code runs only
if it is named in the allow-list, and a method that cannot be loaded stops the server: it is
never skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from calibrators.interface import Calibrator
from calibrators.settings import CalibrationSettings

GROUP = "trimtab.calibrators"
BUILT_IN = ("zerotuning", "act", "var", "gift", "vhr")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class RegistryError(Exception):
    """A calibrator that cannot be offered; says which one and why."""


class Registry(Mapping[str, Calibrator]):
    """Calibrators by name, in the order they were registered."""

    def __init__(self, calibrators: Iterable[Calibrator] = ()) -> None:
        self._calibrators: dict[str, Calibrator] = {}
        for calibrator in calibrators:
            self.register(calibrator)

    def register(self, calibrator: Calibrator) -> None:
        """Add a calibrator.

        Raises:
            RegistryError: it lacks part of the contract, or its name is malformed or taken.
        """
        origin = f"{type(calibrator).__module__}.{type(calibrator).__qualname__}"
        if not isinstance(calibrator, Calibrator):
            missing = sorted(n for n in _contract() if not hasattr(calibrator, n))
            raise RegistryError(f"{origin} is no calibrator: it lacks {', '.join(missing)}")
        if not NAME.fullmatch(calibrator.name):
            raise RegistryError(f"{origin}: the name {calibrator.name!r} must match {NAME.pattern}")
        if calibrator.name in self._calibrators:
            other = type(self._calibrators[calibrator.name])
            raise RegistryError(
                f"the name {calibrator.name!r} of {origin} is taken by "
                f"{other.__module__}.{other.__qualname__}"
            )
        for declared in ("across_heads", "chooses_heads", "reads_query"):
            if not isinstance(getattr(calibrator, declared, False), bool):
                raise RegistryError(f"{origin}.{declared} must be True or False, or left out")
        _check_settings(calibrator, origin)
        self._calibrators[calibrator.name] = calibrator

    def __getitem__(self, name: str) -> Calibrator:
        return self._calibrators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calibrators)

    def __len__(self) -> int:
        return len(self._calibrators)


def installed() -> list[str]:
    """Names that installed packages provide, sorted; nothing of theirs is imported."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load(names: Iterable[str] = BUILT_IN) -> Registry:
    """The named calibrators, imported and checked.

    Raises:
        RegistryError: a name nobody provides or two packages provide, or a provider that
            cannot be imported or breaks the contract.
    """
    return Registry(_create(name) for name in names)


def _create(name: str) -> Calibrator:
    provider = _provider(name)
    try:
        calibrator: Calibrator = provider.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise RegistryError(
            f"calibrator {name!r} ({provider.value}) cannot be loaded: {error}"
        ) from error
    if getattr(calibrator, "name", name) != name:
        raise RegistryError(f"entry point {name!r} ({provider.value}) provides {calibrator.name!r}")
    return calibrator


def _provider(name: str) -> EntryPoint:
    found = entry_points(group=GROUP, name=name)
    providers = {entry.value: entry for entry in found}
    if not providers:
        raise RegistryError(
            f"no installed package provides the calibrator {name!r}; "
            f"installed: {', '.join(installed()) or 'none'}"
        )
    if len(providers) > 1:
        raise RegistryError(f"calibrator {name!r} is provided by {' and '.join(sorted(providers))}")
    return next(iter(providers.values()))


def _contract() -> set[str]:
    methods = {name for name in vars(Calibrator) if not name.startswith("_")}
    return methods | set(Calibrator.__annotations__)


def _check_settings(calibrator: Calibrator, origin: str) -> None:
    settings = calibrator.Settings
    if not (isinstance(settings, type) and issubclass(settings, CalibrationSettings)):
        raise RegistryError(f"{origin}.Settings must subclass CalibrationSettings")
    config = settings.model_config
    if not config.get("strict") or config.get("extra") != "forbid" or config.get("allow_inf_nan"):
        raise RegistryError(
            f"{origin}.Settings must stay strict, forbid unknown fields and refuse NaN and infinity"
        )
