"""Which way a method's rows are rewritten."""

from __future__ import annotations

import pytest

from calibrators.zerotuning import ZeroTuning
from server.engine.batch import Member, row_map
from server.engine.rewrites import Recombining, Rescaling, rewrite
from server.engine.stack import Stack


class Own(ZeroTuning):
    """Has coefficients of its own, and inherits the claim that they have a closed form."""

    name = "own"

    def coefficients(self, masses, parameters):
        return super().coefficients(masses, parameters)


class Renamed(ZeroTuning):
    """Changes nothing that matters."""

    name = "renamed"


class Asked(ZeroTuning):
    """Takes the claim back."""

    name = "asked"
    rescales = None


@pytest.mark.parametrize(
    ("calibrator", "kind"),
    [(ZeroTuning, Rescaling), (Renamed, Rescaling), (Own, Recombining), (Asked, Recombining)],
)
def test_only_coefficients_with_a_closed_form_are_not_asked(add, calibrator, kind):
    request = add("a", 4)
    programs = request.programs
    rows = row_map([Member(request, 0, 0, 0, 4)], programs)
    assert type(rewrite(calibrator(), Stack.of(programs), rows, frozenset({0}))) is kind
