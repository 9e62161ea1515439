from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlavaConfig

from server.fingerprint import fingerprint

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
}


def of(**changes):
    config = LlamaConfig(**{**SIZES, **changes})
    return fingerprint(config, config)


# As a computation of another day and machine has to come out.
HASH = "0d67f06d3720155b0c6bb4f5ce09817d5b6e5e680380cc5bf1b452290e561944"


def test_it_is_the_same_everywhere():
    assert of() == HASH


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"max_position_embeddings": 4096},
        {"bos_token_id": 5},
        {"name_or_path": "/somewhere/else"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_what_does_not_define_the_architecture_does_not_enter(changes):
    assert of(**changes) == of()


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"]},
        {"hidden_size": 128},
        {"intermediate_size": 513},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 2},
        {"head_dim": 32},
        {"vocab_size": 1001},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=str,
)
def test_what_defines_the_architecture_enters(changes):
    assert of(**changes) != of()


OLD = {**SIZES, "model_type": "llama", "transformers_version": "4.30", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 10000, "rope_scaling": None}, {}),
        ({"rope_theta": 10000.0, "head_dim": 64}, {}),
        ({"rope_theta": 10000.0, "head_dim": None}, {}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ),
    ],
    ids=str,
)
def test_forms_of_older_versions_come_out_the_same(old, new):
    config = SimpleNamespace(**{**OLD, **old})
    assert fingerprint(config, config) == of(**new)


def test_the_part_that_sees_enters():
    def seeing(**vision):
        config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision)
        return fingerprint(config, config.get_text_config())

    vision = {"model_type": "clip_vision_model", "hidden_size": 96, "patch_size": 16}
    assert seeing(**vision) == seeing(**vision)
    assert seeing(**vision) != seeing(**{**vision, "patch_size": 8})
    assert seeing(**vision) != of()
