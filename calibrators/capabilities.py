"""What a calibrator's class may declare beyond the contract; who says nothing has none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibrators.interface import Calibrator


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
