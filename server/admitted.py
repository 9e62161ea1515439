"""What admission lets through: calibrations bound to the model, and what follows from them."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from calibrators.canonical import RECEIPT_DIGITS
from calibrators.interface import Bound, Prefill
from server.refusals import FIELD, Refusal


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
        question: any of them looks at the text of the last user message.
    """

    bounds: tuple[Bound, ...]
    digest: str
    touches_prompt_kv: bool
    shareable: bool
    prefill: PrefillRule = PrefillRule()
    text_layers: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    vision: bool = False
    question: bool = False

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


def strictest(rules: Iterable[PrefillRule]) -> PrefillRule:
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
