"""Admission: from the request's `calibration` field to calibrations bound to the model.

Everything a request could get wrong is found here, before anything reaches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from calibrators import capabilities
from calibrators.canonical import canonical_json, digest
from calibrators.capabilities import reads_query
from calibrators.interface import (
    Bound,
    CalibrationError,
    Calibrator,
    ModelFacts,
    Prefill,
    Prompt,
    ResidualPeaks,
)
from calibrators.profiles import Profile, ProfileError
from calibrators.settings import CalibrationSettings
from server.admitted import Admitted as Admitted
from server.admitted import PrefillRule, strictest
from server.engine.facts import StepLimit
from server.engine.text_pass import text_layers
from server.presets import Preset, PresetError
from server.refusals import FIELD as FIELD
from server.refusals import REASONS as REASONS
from server.refusals import Refusal as Refusal
from server.refusals import invalid, kind, listed, quoted

OFF = "none"
# More than any method has parameters; each unknown one costs an error to describe.
MAX_KEYS = 64


class Admission:
    """Admits or refuses the `calibration` field of requests to one served model.

    Args:
        calibrators: the methods on offer.
        facts: of the served model.
        model: identity of the served model, part of every digest.
        profiles: by name, for requests to take parameters from.
        presets: by name.
        default: `calibration` of requests that say nothing.
        limit: calibrations per request at most.
        step: the most tokens of one prompt that a step takes; None for any number.

    Raises:
        ProfileError: a profile is for another model, or its parameters are not admissible.
        PresetError: a preset is not admissible, or has the name of a calibrator.
        Refusal: the default itself is not admissible.
    """

    def __init__(
        self,
        calibrators: Mapping[str, Calibrator],
        facts: ModelFacts,
        model: str,
        *,
        profiles: Mapping[str, Profile] | None = None,
        presets: Mapping[str, Preset] | None = None,
        default: object = None,
        limit: int = 2,
        step: StepLimit | None = None,
    ) -> None:
        self.calibrators = calibrators
        self.facts = facts
        self.profiles = profiles or {}
        self.presets = presets or {}
        self._model = model
        self._limit = limit
        self._step = step
        for profile in self.profiles.values():
            self._check_profile(profile)
        self._settled = {name: self._settle(preset) for name, preset in self.presets.items()}
        self._default: Admitted | None = None
        self._default = self.admit(default)

    def admit(self, field: object) -> Admitted | None:
        """The calibrations a request asks for; None for a plain one.

        Args:
            field: the JSON value of `calibration`, None where it is absent.

        Raises:
            Refusal: it cannot be honoured.
        """
        if field is None:
            return self._default
        if field == OFF:
            return None
        if isinstance(field, str) and field in self._settled:
            return self._settled[field]
        return self._admit(field, FIELD)

    def _admit(self, field: object, path: str) -> Admitted:
        entries = self._entries(field, path)
        pairs = [self._bind(entry, path) for entry, path in entries]
        self._check_combination([calibrator for calibrator, _ in pairs])
        rule = strictest(
            PrefillRule(calibrator.prefill(bound), path, calibrator.name, calibrator.title)
            for (calibrator, bound), (_, path) in zip(pairs, entries, strict=True)
        )
        paths = [path for _, path in entries]
        placed = sorted(zip(pairs, paths, strict=True), key=lambda each: not each[0][0].reweights)
        pairs = [pair for pair, _ in placed]
        canonical = canonical_json([(b, c.revision) for c, b in pairs], self._model)
        causal = all(calibrator.causal for calibrator, _ in pairs)
        return Admitted(
            tuple(bound for _, bound in pairs),
            digest(canonical),
            any(calibrator.touches_prompt_kv for calibrator, _ in pairs),
            # Where the cut depends on the prompt's end, so does what the rows before it hold.
            causal and rule.policy is Prefill.ANY,
            rule,
            text_layers(pairs),
            tuple(path for _, path in placed),
            any(calibrator.modality == "vision" for calibrator, _ in pairs),
            any(reads_query(calibrator) for calibrator, _ in pairs),
        )

    def check_prompt(self, admitted: Admitted, length: int) -> None:
        """Refuse a prompt of `length` tokens that never fits into the one step it needs.

        Raises:
            Refusal: names the length, the limit and the flag.
        """
        rule, step = admitted.prefill, self._step
        if rule.policy is not Prefill.WHOLE or step is None or length <= step.tokens:
            return
        raise Refusal(
            "unsupported_feature",
            rule.path,
            f"{rule.title} needs the whole prompt in one step; this prompt has {length} tokens, "
            f"a step takes {step.tokens}: shorten it, or serve with a higher {step.flag}",
            rule.method,
        )

    def profiles_of(self, calibrator: Calibrator) -> list[str]:
        """Names of the profiles for a method, sorted."""
        return sorted(p.name for p in self.profiles.values() if p.method == calibrator.name)

    def usual(self, calibrator: Calibrator) -> Bound | None:
        """What a request without parameters would get, None where it would be refused."""
        try:
            return calibrator.bind(calibrator.Settings.model_validate({}), self.facts)
        except (ValidationError, CalibrationError):
            return None

    def unavailable(self, calibrator: Calibrator) -> str | None:
        """Why this server cannot use a method at all, None where it can."""
        bound = self.usual(calibrator)
        unsupported = None if bound is None else self._unsupported(calibrator, bound)
        return self._unfit(calibrator) or unsupported

    def _unfit(self, calibrator: Calibrator) -> str | None:
        if calibrator.modality == "vision" and self.facts.modality != "vision":
            return f"{calibrator.title} needs a model that takes images; this one takes text only"
        return None

    def _check_profile(self, profile: Profile) -> None:
        if profile.method not in self.calibrators:
            offer = listed(self.calibrators)
            message = f"there is no calibrator {profile.method!r}; this server offers: {offer}"
            raise ProfileError(profile.file, "method", message)
        profile.check_model(self.facts)
        calibrator = self.calibrators[profile.method]
        own = capabilities.strengths(calibrator)
        if profile.strengths is not None and own in profile.parameters:
            raise ProfileError(profile.file, f"parameters.{own}", "strengths take its place")
        try:
            self._bind({"method": profile.method, "profile": profile.name}, "parameters")
        except Refusal as refusal:
            field = refusal.param.replace("parameters.strengths", "strengths")
            raise ProfileError(profile.file, field, refusal.message) from None

    def _settle(self, preset: Preset) -> Admitted:
        if preset.name in self.calibrators:
            raise PresetError(preset.name, "it has the name of a calibrator; give it another")
        try:
            admitted = self._admit(preset.calibration, FIELD)
        except Refusal as refusal:
            raise PresetError(preset.name, refusal.message) from None
        return admitted

    def _entries(self, field: object, path: str) -> list[tuple[object, str]]:
        if not isinstance(field, list):
            return [(field, path)]
        if not 1 <= len(field) <= self._limit:
            raise Refusal(
                "malformed",
                path,
                f"calibration lists {len(field)} calibrations; 1 to {self._limit} are allowed",
            )
        return [(entry, f"{path}[{index}]") for index, entry in enumerate(field)]

    def _bind(self, entry: object, path: str) -> tuple[Calibrator, Bound]:
        name, body, where = _name_of(entry, path)
        calibrator = self.calibrators.get(name)
        if calibrator is None:
            raise self._unknown(name, where)
        reason = self._unfit(calibrator)
        if reason is not None:
            raise Refusal("unsupported_model", path, reason, name)
        try:
            settings = calibrator.Settings.model_validate(body)
            profile = settings.profile
            if profile is not None:
                settings = self._completed(calibrator, profile, body, path)
            bound = replace(calibrator.bind(settings, self.facts), profile=profile)
        except ValidationError as error:
            raise invalid(error.errors(include_url=False), path, calibrator) from None
        except CalibrationError as error:
            param = f"{path}.{error.param}" if error.param else path
            raise Refusal("invalid_parameter", param, error.message, name) from None
        reason = self._unsupported(calibrator, bound)
        if reason is not None:
            raise Refusal("unsupported_feature", path, reason, name)
        return calibrator, bound

    def _unknown(self, name: str, where: str) -> Refusal:
        offer = f"this server offers: {listed(self.calibrators)}"
        if name in self.presets:
            offer += "; the preset of that name stands alone"
        elif self.presets:
            offer += f"; presets: {listed(self.presets)}"
        return Refusal("unknown_method", where, f"there is no calibrator {quoted(name)}; {offer}")

    def _completed(
        self, calibrator: Calibrator, name: str, body: Mapping[str, Any], path: str
    ) -> CalibrationSettings:
        """Settings of a request and the profile it names."""
        profile = self.profiles.get(name)
        if profile is None or profile.method != calibrator.name:
            problem = (
                f"there is no profile {quoted(name)}"
                if profile is None
                else f"the profile {quoted(name)} is for {profile.method}, not {calibrator.name}"
            )
            raise Refusal(
                "unknown_profile",
                f"{path}.profile",
                f"{problem}; profiles for {calibrator.name}: "
                f"{listed(self.profiles_of(calibrator))}",
                calibrator.name,
            )
        merged = profile.settings(body, capabilities.alternatives(calibrator))
        return capabilities.profile_settings(calibrator).model_validate(merged)

    def _unsupported(self, calibrator: Calibrator, bound: Bound) -> str | None:
        """What a method asks for and this engine cannot do."""
        observations = calibrator.observe(bound, Prompt(0))
        if not observations:
            return None
        prefill = calibrator.prefill(bound)
        peaks = any(isinstance(observation, ResidualPeaks) for observation in observations)
        if not all(prefill in observation.prefills for observation in observations):
            reason = "observes what is not known in time with the prompt cut as it asks"
        elif peaks and not calibrator.touches_prompt_kv:
            reason = "observes the residual stream of prompts whose cached KV it shares with others"
        else:
            return None
        return f"{calibrator.title} {reason}"

    def _check_combination(self, calibrators: Sequence[Calibrator]) -> None:
        for reweights in (True, False):
            group = [c for c in calibrators if c.reweights is reweights]
            if len(group) > 1:
                what = "change attention weights" if reweights else "scale heads"
                names = " and ".join(c.name for c in group)
                raise Refusal(
                    "combination",
                    FIELD,
                    f"{names} both {what}; at most one such calibrator is allowed per request",
                    group[1].name,
                )


def _name_of(entry: object, path: str) -> tuple[str, Mapping[str, Any], str]:
    if isinstance(entry, str):
        return entry, {"method": entry}, path
    if not isinstance(entry, dict):
        raise Refusal(
            "malformed",
            path,
            f"{path} is {kind(entry)}; allowed are the name of a calibrator, an object with "
            'the key "method", a list of those, or "none"',
        )
    if len(entry) > MAX_KEYS:
        raise Refusal(
            "malformed", path, f"{path} has {len(entry)} keys; at most {MAX_KEYS} are allowed"
        )
    name = entry.get("method")
    if not isinstance(name, str):
        raise Refusal(
            "malformed", f"{path}.method", f'{path} needs the key "method", the calibrator\'s name'
        )
    return name, entry, f"{path}.method"
