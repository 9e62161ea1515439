from vllm.config import CUDAGraphMode

from server.engine.graphs import PlainStepsOnly


def test_only_plain_steps_replay_full_graphs():
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
