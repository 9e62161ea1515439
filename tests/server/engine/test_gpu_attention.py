"""Calibration around vLLM's GPU implementations, whose kernels give way to dense equations here.

What is vLLM's own in between is real: the arguments, the halves of the cache, the metadata.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibrators import reference
from server.engine import gpu_attention, residual
from server.engine.batch import members
from server.engine.gpu_attention import (
    PLAN,
    CalibratedFlashAttention,
    CalibratedTritonAttention,
    LogSumExps,
    Planning,
    unreadable,
)
from server.engine.step import Planner
from tests.server.engine.test_step import Step
from tests.server.engine.toy import HEAD_DIM, SCALE
from tests.server.kernels.gpu.kernels import runnable
from tests.server.kernels.gpu.pages import strided

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's kernels are replaced by equations of the CPU"
)

LENGTHS, SPANS = [18, 9, 25], [3, 2, 1]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Interpreted."""
    with runnable():
        yield


def dense(run: Step):
    """A stand-in for stock kernels: checks that it was handed the step, and fills in `out`."""

    def attend(*, q, k, v, out, seqused_k, block_table, return_softmax_lse=False, **options):
        assert torch.equal(q, run.case.query)
        pages, key = block_table.long(), run.case.keys[0]
        assert torch.equal(k[pages[0]].flatten(0, 1)[: len(key)], key)
        assert torch.equal(v[pages[0]].flatten(0, 1)[: len(key)], run.case.values[0])
        assert seqused_k.tolist() == LENGTHS
        out.copy_(run.stock())
        logs = []
        for i, key in enumerate(run.case.keys):
            positions = torch.arange(LENGTHS[i] - SPANS[i], LENGTHS[i])
            score = reference.logits(q[run.rows(i)], key, positions, reference.Geometry(SCALE))
            logs.append(score.logsumexp(-1))
        return (out, torch.cat(logs).T.contiguous()) if return_softmax_lse else out

    return attend


@pytest.fixture
def run(add, table):
    add("a", 18, gamma=0.3)
    add("p", 9, plain=True)
    add("b", 20, gamma=5, heads=[0, 4], layers=[1])
    return Step(table, ["a", "p", "b"], LENGTHS, SPANS, block=16)


@pytest.fixture
def metadata(run):
    starts = torch.tensor(run.starts, dtype=torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    absent = (
        "scheduler_metadata mm_prefix_query_range_tensor rswa_prefix_lens rswa_window "
        "mm_prefix_range_tensor softmax_segm_output softmax_segm_max softmax_segm_expsum"
    )
    return SimpleNamespace(
        num_actual_tokens=sum(SPANS),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=3,
        block_table=run.case.cache.block_table,
        max_query_len=3,
        max_seq_len=25,
        causal=True,
        max_num_splits=0,
        seq_threshold_3D=1,
        num_par_softmax_segments=1,
        **dict.fromkeys(absent.split()),
    )


@pytest.fixture
def make_impl(run, monkeypatch):
    """An implementation as vLLM makes it, its kernel replaced."""

    def make(kind):
        impl = kind(6, HEAD_DIM, SCALE, 2, None, None, "auto")
        if kind is CalibratedFlashAttention:
            impl.vllm_flash_attn_version = 3
            module, name = gpu_attention.flash_attn, "flash_attn_varlen_func"
        else:
            module = __import__(kind.__mro__[2].__module__, fromlist=["unified_attention"])
            name = "unified_attention"
        monkeypatch.setattr(module, name, dense(run), raising=False)
        impl.calibrate_as(1)
        return impl

    return make


IMPLEMENTATIONS = [CalibratedFlashAttention, CalibratedTritonAttention]


def forward(impl, run, metadata):
    """Outputs of a layer, from a cache that holds keys and values side by side."""
    halves = strided(run.case.cache, HEAD_DIM)
    cache = torch.cat([halves.keys, halves.values], -1)
    one = torch.ones(1)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    output = torch.empty_like(run.case.query)
    nothing = torch.empty(0)
    impl.forward(layer, run.case.query, nothing, nothing, cache, metadata, output)
    return output


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_rows_are_calibrated_after_the_stock_kernel(kind, make_impl, run, metadata):
    impl = make_impl(kind)
    batch = members(run.table, run.names, run.starts, run.lengths)
    setattr(metadata, PLAN, Planner().plan(batch))
    output = forward(impl, run, metadata)
    expected = run.expected([[0.3] * 6, [1] * 6, [5, 1, 1, 1, 5, 1]])
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
    plain = run.rows(1)
    assert torch.equal(output[plain], run.stock().float()[plain])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_without_a_plan_it_is_the_stock_kernel_alone(kind, make_impl, run, metadata):
    assert torch.equal(forward(make_impl(kind), run, metadata), run.stock().float())


def test_log_sum_exps_are_asked_for_where_a_layer_is_calibrated():
    asked = []

    def attend(**options):
        asked.append(options)
        return ("output", "lse") if options.get("return_softmax_lse") else "output"

    function = LogSumExps(attend)
    assert function(q=1) == "output"
    assert function.of(lambda: function(q=2)) == "lse"
    assert function(q=3) == "output"
    assert function.of(lambda: None) is None
    assert asked == [{"q": 1}, {"q": 2, "return_softmax_lse": True}, {"q": 3}]
    with pytest.raises(ZeroDivisionError):
        function.of(lambda: 1 / 0)
    assert function(q=4) == "output"


def test_log_sum_exps_of_parts_of_the_keys_are_not_taken_for_the_whole():
    """As of a prefix that all requests share, and of what each has behind it."""
    function = LogSumExps(lambda **options: ("output", "lse"))

    def cascade():
        prefix = function(q=1, return_softmax_lse=True)
        assert prefix == function(q=2, return_softmax_lse=True) == ("output", "lse")

    assert function.of(cascade) is None
    assert function.of(lambda: function(q=3)) == "lse"


def test_the_residual_stream_finds_the_plan(make_impl, monkeypatch):
    impl, seen = make_impl(CalibratedTritonAttention), []
    plan = SimpleNamespace(enter=lambda layer, hidden, rest: seen.append((layer, hidden, rest)))
    context = SimpleNamespace(
        attn_metadata={"layers.1.attn": SimpleNamespace(**{PLAN: plan}), "plain": object()},
        no_compile_layers={"layers.1.attn": SimpleNamespace(impl=impl)},
    )
    monkeypatch.setattr(residual, "get_forward_context", lambda: context)
    residual.enter_layer("hidden", "rest", "layers.1.attn")
    residual.enter_layer("hidden", "rest", "plain")
    assert seen == [(1, "hidden", "rest")]


def test_the_function_is_replaced_once_for_all_layers(make_impl):
    first, second = (make_impl(CalibratedFlashAttention) for _ in range(2))
    second.calibrate_as(2)
    first.calibrate_as(0)
    assert first.log_sum_exps is second.log_sum_exps


@pytest.mark.parametrize("planned", [True, False])
def test_a_builder_attaches_the_plan(planned):
    class Stock:
        def build(self, common_prefix_len, common, fast_build=False):
            return SimpleNamespace(given=(common_prefix_len, common, fast_build))

    builder = type("Builder", (Planning, Stock), {})()
    assert not hasattr(builder.build(0, "common"), PLAN)
    builder.calibration = SimpleNamespace(plan=lambda common: "plan" if planned else None)
    metadata = builder.build(3, "common", fast_build=True)
    assert metadata.given == (3, "common", True)
    assert getattr(metadata, PLAN, None) == ("plan" if planned else None)


def test_layers_that_cannot_be_calibrated_say_why(make_impl):
    impl = make_impl(CalibratedTritonAttention)
    good = SimpleNamespace(impl=impl, kv_cache=torch.empty(0, dtype=torch.bfloat16))
    assert unreadable(good) is None
    quantised = SimpleNamespace(impl=impl, kv_cache=torch.empty(0, dtype=torch.float8_e4m3fn))
    assert "--kv-cache-dtype auto" in unreadable(quantised)
    other = SimpleNamespace(impl=SimpleNamespace(), kv_cache=good.kv_cache)
    assert "FLASH_ATTN or TRITON_ATTN" in unreadable(other)
    impl.use_alibi_sqrt = True
    assert "ALiBi" in unreadable(good)


def test_a_window_counts_the_row_itself():
    impl = CalibratedTritonAttention(6, HEAD_DIM, SCALE, 2, None, 7, "auto")
    impl.calibrate_as(0)
    assert impl.geometry.window == 7
    impl = CalibratedTritonAttention(6, HEAD_DIM, SCALE, 2, None, None, "auto")
    impl.calibrate_as(0)
    assert impl.geometry.window == 0
