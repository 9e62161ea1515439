import pytest

from calibrators.gift import GIFT, GIFTSettings
from calibrators.models import MODELS, Published, published
from calibrators.var import VAR, VARSettings
from calibrators.vhr import VHR, VHRSettings

LLAVA, QWEN2 = "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"


@pytest.fixture
def facts_of(make_facts):
    def make(shape):
        architecture, layers, hidden_size, kv_heads = shape
        return make_facts(
            architecture=architecture,
            layers=layers,
            hidden_size=hidden_size,
            kv_heads=kv_heads,
            query_heads=4 * kv_heads,
            modality="vision",
        )

    return make


@pytest.mark.parametrize("shape", MODELS)
def test_all_methods_bind_to_a_published_model(facts_of, shape):
    facts, known = facts_of(shape), MODELS[shape]
    assert VAR().bind(VARSettings(), facts).params["sink_dims"] == [*known.sink_dims]
    gift, vhr = GIFT().bind(GIFTSettings(), facts), VHR().bind(VHRSettings(), facts)
    for bound, entry in ((gift, known.enhancement), (vhr, known.vision_layers)):
        assert bound.params["defaults"] == (None if entry else "depth-scaled")


def test_what_is_published(facts_of):
    llava = facts_of((LLAVA, 32, 4096, 32))
    gift = GIFT().bind(GIFTSettings(), llava)
    assert (gift.params["saliency_layer"], gift.params["layers"]) == (11, [*range(12, 23)])
    assert (gift.params["alpha"], gift.params["beta"], gift.layers) == (5.0, 1.0, 11)
    assert VHR().bind(VHRSettings(), llava).params["layers"] == [1, *range(18, 32)]
    assert VAR().bind(VARSettings(), llava).params["layers"] == [*range(2, 31)]
    qwen = GIFT().bind(GIFTSettings(), facts_of((QWEN2, 28, 3584, 4)))
    assert (qwen.params["saliency_layer"], qwen.params["alpha"]) == (14, 4.0)
    assert qwen.params["layers"] == [*range(5, 19)]


@pytest.mark.parametrize(
    "shape",
    [
        (LLAVA, 32, 4096, 8),  # Llama 3 or Mistral inside
        (LLAVA, 40, 5120, 8),  # Pixtral
        (LLAVA, 32, 5120, 32),
        ("LlamaForCausalLM", 32, 4096, 32),
    ],
)
def test_a_model_of_another_shape_is_another_model(facts_of, shape):
    assert published(facts_of(shape)) == Published()
