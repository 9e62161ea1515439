import asyncio

from server.profiling.var import Plan, search
from tests.server.profiling.worlds import searched

KNOWN = {"sink_dims": [7, 300], "tau": 12.0}


def course(accuracy, remarks=(), **plan):
    """A search over scores that are a function of rho and share; 0.5 plainly."""

    def score(stage, calibration):
        if calibration is None:
            return {"accuracy": 0.5, "margin": 0.0}
        return {"accuracy": 0.5, "margin": 0.0} | accuracy(calibration["rho"], calibration["share"])

    plan = Plan((7, 300), 12.0, **plan)
    return asyncio.run(searched(search(plan, remarks), score))


def test_rho_is_chosen_and_share_swept_with_it():
    found = course(lambda rho, share: {"accuracy": 0.6 + 0.1 * (rho == 0.8) - (share - 0.4) ** 2})

    assert found.choice.parameters == KNOWN | {"rho": 0.8, "share": 0.4}
    assert [scored.stage.name for scored in found.stages] == ["probe", "sweep"]
    assert found.choice.remarks == ()


def test_every_candidate_has_the_channels_and_tau():
    stages = [scored.stage for scored in course(lambda rho, share: {"accuracy": 0.6}).stages]
    probe, sweep = ([c.calibration for c in stage.candidates] for stage in stages)

    assert probe == [
        None,
        *({"method": "var", **KNOWN, "rho": rho, "share": 0.6} for rho in (0.5, 0.8, 0.9)),
    ]
    assert {c["share"] for c in sweep} == {0.2, 0.4, 0.6, 0.8, 1.0}
    assert {(c["rho"], c["tau"]) for c in sweep} == {(0.9, 12.0)}


def test_of_equal_ones_the_mildest_is_taken():
    found = course(lambda rho, share: {"accuracy": 0.6})

    assert found.choice.parameters == KNOWN | {"rho": 0.9, "share": 0.2}


def test_margins_decide_between_equal_accuracies():
    found = course(lambda rho, share: {"margin": 0.1 * (rho == 0.5) + 0.01 * (share == 0.8)})

    assert found.choice.parameters == KNOWN | {"rho": 0.5, "share": 0.8}


def test_where_nothing_helps_the_least_bad_is_taken_and_told():
    found = course(lambda rho, share: {"accuracy": 0.4 + 0.01 * rho - 0.1 * share}, ("Seen.",))

    assert found.choice.parameters == KNOWN | {"rho": 0.9, "share": 0.2}
    assert found.choice.remarks[0] == "Seen."
    assert found.choice.remarks[1].startswith("No share was better than the baseline")


def test_without_any_change_channels_and_tau_are_what_was_found():
    found = course(lambda rho, share: {}, ("Seen.",))

    assert found.choice.parameters == KNOWN
    assert found.choice.remarks == (
        "Seen.",
        "No rho changed any score: rho and share stay the method's.",
    )
    assert [scored.stage.name for scored in found.stages] == ["probe"]
