"""Reports on outputs that are there at once, and on those that are awaited."""

import pytest
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from server.engine.arriving import ATTRIBUTE, with_reports
from server.engine.payload import Report, Tally


class Awaited(AsyncModelRunnerOutput):
    """Has its tokens when it is asked."""

    def get_output(self):
        return ModelRunnerOutput(["a"], {"a": 0}, [[7]])


@pytest.fixture
def report():
    return Report("t", [Tally(prompt_tokens=5, sums={"x": 1.0}, details={"d": {"0": 1}})])


def test_an_output_that_is_there_carries_reports(report):
    output = ModelRunnerOutput(["a"], {"a": 0})
    assert with_reports(output, {"a": report.settled()}) is output
    assert getattr(output, ATTRIBUTE) == {"a": report}


def test_an_awaited_output_carries_what_held_in_its_own_step(report):
    arriving = with_reports(Awaited(), {"a": report.settled()})
    (tally,) = report.tallies
    tally.completion_tokens += 1
    tally.sums["x"] += 1
    tally.details["d"]["1"] = 2
    # As vLLM's executors wait for it.
    output = AsyncOutputFuture(arriving, single_value=True).result()
    assert output.sampled_token_ids == [[7]]
    (told,) = getattr(output, ATTRIBUTE)["a"].tallies
    assert (told.prompt_tokens, told.completion_tokens) == (5, 0)
    assert (told.sums, told.details) == ({"x": 1.0}, {"d": {"0": 1}})


def test_a_step_that_is_sampled_later_has_nothing_to_carry_them(report):
    assert with_reports(None, {"a": report.settled()}) is None
