import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from examples.shapes_llava.checkpoint import WEIGHTS, old_name, rename, save
from examples.shapes_llava.network import build_model
from examples.shapes_llava.tokens import build_processor, build_tokenizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vision_tower.encoder.layers.0.x", "vision_tower.vision_model.encoder.layers.0.x"),
        ("vision_tower.vision_model.x", "vision_tower.vision_model.x"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
    ],
)
def test_names_of_the_vision_tower_are_the_old_ones(name, expected):
    assert old_name(name) == expected


def test_renaming_twice_changes_nothing(tmp_path):
    file = tmp_path / WEIGHTS
    save_file({"vision_tower.a": torch.ones(2)}, file)
    rename(file)
    rename(file)

    assert list(load_file(file)) == ["vision_tower.vision_model.a"]


def test_a_saved_model_comes_back_rounded(tmp_path):
    processor = build_processor(build_tokenizer())
    with torch.random.fork_rng():
        model = build_model(processor.tokenizer)
    save(model, processor, tmp_path)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name
    names = set(load_file(tmp_path / WEIGHTS))
    assert {name.split(".")[0] for name in names} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }
    assert all(".vision_model." in name for name in names if name.startswith("vision_tower"))
