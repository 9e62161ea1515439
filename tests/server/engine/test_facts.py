from types import SimpleNamespace

import pytest

from server.engine.facts import StepLimit, counts_for_all, step_limit


@pytest.mark.parametrize(
    ("batched", "scheduled", "threshold", "expected"),
    [
        (2048, None, 0, StepLimit(2048, "--max-num-batched-tokens")),
        (2048, 2048, 0, StepLimit(2048, "--max-num-batched-tokens")),
        (2048, 1024, 0, StepLimit(1024, "--max-num-scheduled-tokens")),
        (2048, 1024, 512, StepLimit(512, "--long-prefill-token-threshold")),
        (256, None, 512, StepLimit(256, "--max-num-batched-tokens")),
    ],
)
def test_the_lowest_limit_counts(batched, scheduled, threshold, expected):
    scheduler = SimpleNamespace(
        max_num_batched_tokens=batched,
        max_num_scheduled_tokens=scheduled,
        long_prefill_token_threshold=threshold,
    )
    assert step_limit(SimpleNamespace(scheduler_config=scheduler)) == expected


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False), (3, False), (-1, True)])
def test_one_of_several_front_ends_counts_for_all(rank, counts):
    parallel = SimpleNamespace(_api_process_rank=rank)
    assert counts_for_all(SimpleNamespace(parallel_config=parallel)) is counts
