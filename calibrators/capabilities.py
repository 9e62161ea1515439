"""What a calibrator's class may declare beyond the contract; who says nothing has none of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibrators.interface import Calibrator
    from calibrators.settings import CalibrationSettings


def across_heads(calibrator: Calibrator) -> bool:
    """Whether a head's coefficients depend on the other heads of its layer.

    Declared by `across_heads: ClassVar[bool] = True`. The `coefficients` of such a method get the
    masses and parameters of all query heads of the model, and give coefficients for all of them;
    under tensor parallelism the masses are gathered first, and every rank asks for the same. Masses
    are measured on the heads that `LayerPlan.heads` selects: a plan selects every head that is to
    be looked at, and `Coefficients.apply` says which of them are rewritten.
    """
    return bool(getattr(calibrator, "across_heads", False))


def chooses_heads(calibrator: Calibrator) -> bool:
    """Whether a method chooses its heads for each request, from what it observes.

    Declared by `chooses_heads: ClassVar[bool] = True`. `Bound.heads` then is the number of heads it
    chooses from, and the receipt's `heads` the number that its plans select in all layers.
    """
    return bool(getattr(calibrator, "chooses_heads", False))


def reads_query(calibrator: Calibrator) -> bool:
    """Whether a method looks at the text of the last user message, `Prompt.query` and its words.

    Declared by `reads_query: ClassVar[bool] = True`. Where that text cannot be found in a prompt,
    a request for such a method is refused.
    """
    return bool(getattr(calibrator, "reads_query", False))


def alternatives(calibrator: Calibrator) -> Sequence[Sequence[str]]:
    """Groups of parameters of which a request gives one at most.

    Declared by `alternatives: ClassVar[tuple[tuple[str, ...], ...]]`. A request that names one of a
    group leaves out what its profile has for the others.
    """
    groups: Sequence[Sequence[str]] = getattr(calibrator, "alternatives", ())
    return groups


def strengths(calibrator: Calibrator) -> str | None:
    """The parameter that a profile may give by layer and query head; None where there is none.

    Declared by `strengths: ClassVar[str]`, together with `ProfileSettings`.
    """
    name: str | None = getattr(calibrator, "strengths", None)
    return name


def profile_settings(calibrator: Calibrator) -> type[CalibrationSettings]:
    """The settings that a request and its profile make together.

    Declared by `ProfileSettings: ClassVar[type[CalibrationSettings]]`, a subclass of `Settings`
    with one field more, `strengths`: `{layer: {head: value}}` or None. `bind` of such a method gets
    one or the other.
    """
    settings: type[CalibrationSettings] = getattr(
        calibrator, "ProfileSettings", calibrator.Settings
    )
    return settings
