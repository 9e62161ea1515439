"""Admission: from the request's `calibration` field to calibrations bound to the model.

Everything a request could get wrong is found here, before anything reaches the engine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from calibrators.canonical import RECEIPT_DIGITS, canonical_json, digest
from calibrators.interface import (
    Bound,
    CalibrationError,
    Calibrator,
    ModelFacts,
    Prefill,
    Prompt,
    ResidualPeaks,
)
from server.engine.facts import StepLimit
from server.engine.text_pass import text_layers

FIELD = "calibration"
OFF = "none"
# More than any method has parameters; each unknown one costs an error to describe.
MAX_KEYS = 64
# What a client's word may take up in an error message.
_QUOTE = 80
# Lists nested deeper than the stack and objects of a million keys are quoted in part.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxlevel = 3
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = _QUOTE
# Errors that say no more than that another form of the field was meant.
_OTHER_FORM = frozenset({"literal_error", "list_type", "dict_type"})


class Refusal(Exception):
    """A calibration that is refused.

    Args:
        reason: label of the rejection metric, from `REASONS`.
        param: path of the offending field, `calibration` included.
        message: the rule, the value and what is allowed.
        method: the calibrator concerned, where it is known.
    """

    def __init__(self, reason: str, param: str, message: str, method: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.param = param
        self.message = message
        self.method = method


REASONS = (
    "malformed",
    "unknown_method",
    "invalid_parameter",
    "unsupported_model",
    "combination",
    "unsupported_feature",
    "no_image",
)


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """How a request's prompt may be cut into steps, and which calibration says so."""

    policy: Prefill = Prefill.ANY
    path: str = FIELD
    method: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Calibrations that will be applied, in order.

    Attributes:
        bounds: resolved settings.
        digest: 64 hex digits over the canonical form and the model.
        touches_prompt_kv: cached KV is shared only between equal digests.
        shareable: cached KV may be shared at all.
        prefill: the strictest of its calibrations' rules.
        text_layers: layers in which the prompt has to be seen without its images first.
        paths: where in the request each of `bounds` was asked for.
        vision: any of them needs an image.
    """

    bounds: tuple[Bound, ...]
    digest: str
    touches_prompt_kv: bool
    shareable: bool
    prefill: PrefillRule = PrefillRule()
    text_layers: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    vision: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(bound.method for bound in self.bounds)

    @property
    def short_digest(self) -> str:
        """The digits shown to clients."""
        return self.digest[:RECEIPT_DIGITS]

    @property
    def header(self) -> str:
        """Value of `X-Calibration`."""
        return f"{'+'.join(self.methods)};digest={self.short_digest}"

    def cache_salt(self, key: bytes, tenant: str, user_salt: str | None) -> str | None:
        """Salt that keeps this calibration's cached KV apart; None where the user's will do.

        HMAC-SHA256 in hex: nobody without the key can choose a salt that meets it.
        """
        if self.shareable and not self.touches_prompt_kv:
            return user_salt
        parts = [self.digest, tenant, user_salt]
        if not self.shareable:
            parts.append(secrets.token_hex(16))
        return hmac.new(key, json.dumps(parts).encode(), hashlib.sha256).hexdigest()


class Admission:
    """Admits or refuses the `calibration` field of requests to one served model.

    Args:
        calibrators: the methods on offer.
        facts: of the served model.
        model: identity of the served model, part of every digest.
        default: `calibration` of requests that say nothing.
        limit: calibrations per request at most.
        step: the most tokens of one prompt that a step takes; None for any number.
        ranks: tensor-parallel ranks.

    Raises:
        Refusal: the default itself is not admissible.
    """

    def __init__(
        self,
        calibrators: Mapping[str, Calibrator],
        facts: ModelFacts,
        model: str,
        *,
        default: object = None,
        limit: int = 2,
        step: StepLimit | None = None,
        ranks: int = 1,
    ) -> None:
        self.calibrators = calibrators
        self.facts = facts
        self._model = model
        self._limit = limit
        self._step = step
        self._ranks = ranks
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
        entries = self._entries(field)
        pairs = [self._bind(entry, path) for entry, path in entries]
        self._check_combination([calibrator for calibrator, _ in pairs])
        rule = _strictest(
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

    def _entries(self, field: object) -> list[tuple[object, str]]:
        if not isinstance(field, list):
            return [(field, FIELD)]
        if not 1 <= len(field) <= self._limit:
            raise Refusal(
                "malformed",
                FIELD,
                f"calibration lists {len(field)} calibrations; 1 to {self._limit} are allowed",
            )
        return [(entry, f"{FIELD}[{index}]") for index, entry in enumerate(field)]

    def _bind(self, entry: object, path: str) -> tuple[Calibrator, Bound]:
        name, body, where = _name_of(entry, path)
        calibrator = self.calibrators.get(name)
        if calibrator is None:
            known = ", ".join(sorted(self.calibrators)) or "none"
            raise Refusal(
                "unknown_method",
                where,
                f"there is no calibrator {_quoted(name)}; this server offers: {known}",
            )
        reason = self._unfit(calibrator)
        if reason is not None:
            raise Refusal("unsupported_model", path, reason, name)
        try:
            bound = calibrator.bind(calibrator.Settings.model_validate(body), self.facts)
        except ValidationError as error:
            raise _invalid(error.errors(include_url=False), path, calibrator) from None
        except CalibrationError as error:
            param = f"{path}.{error.param}" if error.param else path
            raise Refusal("invalid_parameter", param, error.message, name) from None
        reason = self._unsupported(calibrator, bound)
        if reason is not None:
            raise Refusal("unsupported_feature", path, reason, name)
        return calibrator, bound

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
        elif peaks and self._ranks > 1:
            reason = (
                "observes the residual stream, which was not tested on several tensor-parallel "
                "ranks: serve without --tensor-parallel-size"
            )
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


def _strictest(rules: Iterable[PrefillRule]) -> PrefillRule:
    """The one rule of several that all agree to."""
    strict = {rule.policy: rule for rule in rules if rule.policy is not Prefill.ANY}
    if len(strict) > 1:
        whole, split = strict[Prefill.WHOLE].method, strict[Prefill.SPLIT_LAST].method
        raise Refusal(
            "combination",
            FIELD,
            f"{whole} needs the whole prompt in one step and {split} its last token in a step of "
            "its own; at most one of them is allowed per request",
            split,
        )
    return next(iter(strict.values()), PrefillRule())


def _name_of(entry: object, path: str) -> tuple[str, Mapping[str, Any], str]:
    if isinstance(entry, str):
        return entry, {"method": entry}, path
    if not isinstance(entry, dict):
        raise Refusal(
            "malformed",
            path,
            f"{path} is {_kind(entry)}; allowed are the name of a calibrator, an object with "
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


def _invalid(errors: Sequence[ErrorDetails], path: str, calibrator: Calibrator) -> Refusal:
    error = _most_telling(errors)
    location = errors[0]["loc"]
    param = f"{path}.{_quoted(location[0], quotes=False)}" if location else path
    fields = calibrator.Settings.model_fields
    if error["type"] == "extra_forbidden":
        known = ", ".join(name for name in fields if name != "method")
        message = f"{calibrator.name} has no parameter {_quoted(location[0])}; it has {known}"
    else:
        field = fields.get(str(location[0])) if location else None
        allowed = " ".join((field.description or "").split()) if field else ""
        value = errors[0]["input"]
        message = f"{param} is {_quoted(value)}, which is not allowed: {error['msg']}. {allowed}"
    return Refusal("invalid_parameter", param, message.rstrip(), calibrator.name)


def _most_telling(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Of the errors on the first field, one per form it may take, that of the form meant."""
    field = errors[0]["loc"][:1]
    return max(
        (error for error in errors if error["loc"][:1] == field),
        key=lambda error: (len(error["loc"]), error["type"] not in _OTHER_FORM),
    )


def _quoted(value: object, *, quotes: bool = True) -> str:
    text = _SHORTENED.repr(value) if quotes else str(value)
    return text if len(text) <= _QUOTE else text[:_QUOTE] + "..."


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "not a calibration")
