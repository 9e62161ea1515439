"""Where images and words are once vLLM's own processors are through with a chat; no engine runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import ChatParams, renderer_from_config

from calibrators.interface import Span
from server.engine import wording
from server.engine.geometry import Geometry
from server.engine.payload import KEY, Payload
from server.engine.prompts import inspect
from tests.fixtures import llava, processors
from tests.integration.vision_cases import LONG, Conversation

MODELS = {
    "llava": (llava.build, "<image>"),
    "qwen2-vl": (processors.qwen2_vl, "<|image_pad|>"),
    "idefics3": (processors.idefics3, "<image>"),
}


class Chat:
    """A renderer as a server sets it up, and what `inspect` makes of its prompts."""

    def __init__(self, folder: Path) -> None:
        arguments = AsyncEngineArgs(str(folder), dtype="float32", enforce_eager=True)
        config = arguments.create_engine_config()
        self.renderer: Any = renderer_from_config(config)
        self.engine: Any = SimpleNamespace(
            renderer=self.renderer, vllm_config=config, generate=lambda *_: None
        )
        self.seen: list[Geometry] = []
        wording.look_for(self.engine)
        inspect(self.engine, lambda _, geometry: self.seen.append(geometry))

    def geometry(self, conversation: Conversation, **changes: Any) -> tuple[Any, Geometry]:
        """The engine's input and its geometry."""
        params = ChatParams(chat_template_kwargs={"tokenize": False, "add_generation_prompt": True})
        tokens = self.renderer.default_chat_tok_params
        rendering = self.renderer.render_chat_async([conversation.messages], params, tokens)
        sampling = SimpleNamespace(extra_args={KEY: Payload("ticket", ()).to_extra_args()})
        with wording.wanted():
            (engine_input,) = asyncio.run(rendering)[1]
            self.engine.generate(engine_input | changes, sampling)
        prompt = Payload.from_extra_args(sampling.extra_args).prompt
        assert prompt == self.seen[-1].prompt
        return engine_input, self.seen[-1]

    def text(self, engine_input: Any, span: Span) -> str:
        """What stands in a span of tokens."""
        tokens = engine_input["prompt_token_ids"][span.start : span.stop]
        decoded: str = self.renderer.get_tokenizer().decode(tokens)
        return decoded


@pytest.fixture(scope="module", params=MODELS)
def chat(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chat, str, str]:
    build, token = MODELS[request.param]
    folder: Path = build(tmp_path_factory.mktemp(request.param) / "model")
    return Chat(folder), token, request.param


def test_image_tokens_question_and_words_are_found(chat):
    chat, token, name = chat
    engine_input, geometry = chat.geometry(LONG)
    prompt, ids = geometry.prompt, engine_input["prompt_token_ids"]
    image = chat.renderer.get_tokenizer().convert_tokens_to_ids(token)
    positions = [p for span in prompt.images for p in range(span.start, span.stop)]
    assert positions == [position for position, each in enumerate(ids) if each == image]
    assert (len(prompt.extents), len(prompt.images)) == ((3, 15) if name == "idefics3" else (0, 3))
    assert geometry.question
    assert "".join(chat.text(engine_input, span) for span in prompt.query) == LONG.turns[-1][1]
    assert [chat.text(engine_input, span).strip() for span in prompt.content] == list(LONG.content)
    assert prompt.query[0].start > prompt.images[-1].stop - 1


def test_a_question_around_its_images(chat):
    chat, _, name = chat
    (images, text), *_ = LONG.turns
    messages = Conversation((((images), text),)).messages
    front, back = {"type": "text", "text": "Look."}, {"type": "text", "text": "Well, which?"}
    messages[0]["content"] = [front, messages[0]["content"][0], back]
    conversation = SimpleNamespace(messages=messages)
    engine_input, geometry = chat.geometry(conversation)
    texts = [chat.text(engine_input, span) for span in geometry.prompt.query]
    first, last = geometry.prompt.images[0], geometry.prompt.images[-1]
    if name == "llava":  # whose template has all images first
        assert "".join(texts).strip() == "Look. Well, which?"
        assert geometry.prompt.query[0].start >= last.stop
    else:
        assert texts == ["Look.", "Well, which?"]
        assert geometry.prompt.query[0].stop <= first.start
        assert geometry.prompt.query[1].start >= last.stop
    assert [chat.text(engine_input, s).strip(" .") for s in geometry.prompt.content] == [
        "Look",
        "Well",
    ]


def test_a_prompt_that_was_cut_has_images_and_no_question(chat):
    chat, *_ = chat
    engine_input, _ = chat.geometry(LONG)
    cut = engine_input["prompt_token_ids"][:-3]
    _, geometry = chat.geometry(LONG, prompt_token_ids=cut)
    assert (geometry.question, geometry.prompt.query, geometry.prompt.content) == (False, (), ())
    assert (geometry.prompt.length, bool(geometry.prompt.images)) == (len(cut), True)
