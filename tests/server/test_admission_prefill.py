import pytest

from calibrators.interface import Prefill
from server.admission import Admission, Refusal
from server.engine.facts import StepLimit

POLICIES = {"any": Prefill.ANY, "whole": Prefill.WHOLE, "split": Prefill.SPLIT_LAST}
STEP = StepLimit(64, "--max-num-batched-tokens")


@pytest.fixture
def admission(make_facts, make_calibrator):
    """Admission with a calibrator per policy; those called `head-...` only scale heads."""
    fakes = [
        make_calibrator(
            prefix + name,
            reweights=not prefix,
            prefill=lambda self, bound, policy=policy: policy,
        )
        for name, policy in POLICIES.items()
        for prefix in ("", "head-")
    ]
    offer = {fake.name: fake for fake in fakes}
    return Admission(offer, make_facts(), "model", step=STEP)


@pytest.mark.parametrize(
    ("names", "policy", "path"),
    [
        (["any"], Prefill.ANY, "calibration"),
        (["whole"], Prefill.WHOLE, "calibration[0]"),
        (["split"], Prefill.SPLIT_LAST, "calibration[0]"),
        (["any", "head-any"], Prefill.ANY, "calibration"),
        (["any", "head-whole"], Prefill.WHOLE, "calibration[1]"),
        (["head-split", "any"], Prefill.SPLIT_LAST, "calibration[0]"),
        (["head-any", "whole"], Prefill.WHOLE, "calibration[1]"),
        (["whole", "head-whole"], Prefill.WHOLE, "calibration[1]"),
    ],
)
def test_the_strictest_policy_holds(admission, names, policy, path):
    rule = admission.admit(names).prefill
    assert (rule.policy, rule.path) == (policy, path)
    assert admission.admit(names).shareable == (policy is Prefill.ANY)


@pytest.mark.parametrize("names", [["whole", "head-split"], ["head-whole", "split"]])
def test_policies_that_exclude_each_other_are_refused(admission, names):
    for order in (names, names[::-1]):
        with pytest.raises(Refusal) as caught:
            admission.admit(order)
        assert (caught.value.reason, caught.value.param) == ("combination", "calibration")
        assert all(name in caught.value.message for name in names)
        assert caught.value.method in names
        assert caught.value.message.endswith("its own; at most one of them is allowed per request")


def test_a_prompt_that_never_fits_is_refused(admission):
    admitted = admission.admit("whole")
    admission.check_prompt(admitted, 64)
    with pytest.raises(Refusal) as caught:
        admission.check_prompt(admitted, 65)
    refusal = caught.value
    assert (refusal.reason, refusal.param) == ("unsupported_feature", "calibration")
    assert refusal.method == "whole"
    for said in ("Whole", "65 tokens", "64", "--max-num-batched-tokens"):
        assert said in refusal.message


@pytest.mark.parametrize("name", ["any", "split"])
def test_other_prompts_may_be_as_long_as_they_like(admission, name):
    admission.check_prompt(admission.admit(name), 10_000)
