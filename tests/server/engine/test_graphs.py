"""Which graphs a step is offered, by vLLM's own dispatchers."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

from server.engine.graphs import PlainStepsOnly, keep_out

MODES = ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "FULL", "NONE"]
SIZES = [1, 2, 4, 8, 16, 32]
LARGEST = 8


def test_only_plain_steps_replay_full_graphs_of_the_v1_runner():
    calibrated, asked = [False], []

    def stock(num_tokens, invalid_modes=None, **options):
        asked.append((num_tokens, invalid_modes, options))
        return "mode", num_tokens

    dispatch = PlainStepsOnly(stock, lambda: calibrated[0])
    assert dispatch(8, has_lora=False) == ("mode", 8)
    assert dispatch(num_tokens=8, invalid_modes={CUDAGraphMode.PIECEWISE}) == ("mode", 8)
    calibrated[0] = True
    dispatch(num_tokens=4)
    dispatch(num_tokens=4, invalid_modes={CUDAGraphMode.PIECEWISE})
    assert asked == [
        (8, None, {"has_lora": False}),
        (8, {CUDAGraphMode.PIECEWISE}, {}),
        (4, {CUDAGraphMode.FULL}, {}),
        (4, {CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE}, {}),
    ]


def manager(mode):
    """The V2 runner's, as if all its graphs were captured; without the devices it captures on."""
    made = object.__new__(CudaGraphManager)
    made.vllm_config = SimpleNamespace(
        speculative_config=None, cache_config=SimpleNamespace(use_kda_recoverssm=False)
    )
    made.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
    )
    made.cudagraph_mode, made.decode_query_len, made.max_num_reqs = CUDAGraphMode[mode], 1, LARGEST
    made.varlen_decode, made.ubatch_runner, made.lora_capture_cases = False, None, [0]
    made._lora_dispatch_map, made._max_lora_case = made._build_lora_dispatch_map()
    made._candidates, made._capture_descs, made._graphs_captured = {}, {}, True
    made._init_candidates()
    return made


def dispatched(made, requests, tokens, uniform):
    """What a step without data parallelism is told to replay."""
    found, _ = dispatch_cg_and_sync_dp(made, requests, tokens, uniform, 1, 0, max_query_len=uniform)
    return found


@pytest.mark.parametrize("mode", MODES)
@given(st.data())
def test_only_plain_batches_replay_full_graphs_of_the_v2_runner(mode, data):
    requests = data.draw(st.integers(1, LARGEST), label="requests")
    uniform = data.draw(st.sampled_from([1, None]), label="tokens of each")
    tokens = requests if uniform else data.draw(st.integers(requests, 40), label="tokens")
    stock = dispatched(manager(mode), requests, tokens, uniform)
    made, calibrated = manager(mode), [False]
    keep_out(SimpleNamespace(cudagraph_manager=made), lambda: calibrated[0])
    assert dispatched(made, requests, tokens, uniform) == stock
    calibrated[0] = True
    found = dispatched(made, requests, tokens, uniform)
    pieces = CUDAGraphMode[mode].has_piecewise_cudagraphs() and tokens <= SIZES[-1]
    assert found.cg_mode == (CUDAGraphMode.PIECEWISE if pieces else CUDAGraphMode.NONE)
    assert found.num_tokens == (min(s for s in SIZES if s >= tokens) if pieces else tokens)
    assert found.num_reqs == (None if pieces else requests)


def test_decoding_alone_has_full_graphs():
    """Or else nothing above would be kept out of any."""
    found = dispatched(manager("FULL_AND_PIECEWISE"), 3, 3, 1)
    assert (found.cg_mode, found.num_reqs) == (CUDAGraphMode.FULL, 4)


def test_the_v1_runner_has_a_dispatcher():
    runner = SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(dispatch=lambda **_: "mode"))
    keep_out(runner, lambda: False)
    assert isinstance(runner.cudagraph_dispatcher.dispatch, PlainStepsOnly)
