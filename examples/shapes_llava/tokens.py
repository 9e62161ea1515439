"""Tokenizer, chat template and image processor, in the form in which LLaVA-1.5 has them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from examples.shapes_llava.questions import turns
from examples.shapes_llava.scenes import PATCH, SIZE, scenes

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
VOCABULARY = 512
MAX_LENGTH = 1024
_SEED = 0

# Text may be a string or a list of parts; an image stands where its part stands.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- '<image>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def prefix() -> str:
    """What comes before every first question."""
    return f"USER: {IMAGE * (SIZE // PATCH) ** 2}"


def question_text(question: str, first: bool) -> str:
    """A question as the chat template writes it, up to where the answer begins."""
    return ("\n" if first else "USER: ") + question + " ASSISTANT:"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: words of the questions are one token each, any other text is bytes.

    It is the same whatever the seed of a training, or weights would not fit each other's tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Text and picture to what the model reads."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def _sentences() -> Iterator[str]:
    rng = np.random.default_rng(_SEED)
    for scene in scenes(_SEED, 2000):
        for turn in turns(scene, rng):
            yield f"{question_text(turn.question, first=True)} {turn.answer}"
            yield question_text(turn.question, first=False)
