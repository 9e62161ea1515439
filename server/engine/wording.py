"""Where the words of the last user message lie in a rendered chat.

A chat template may put anything around them, and the same words may stand elsewhere. So the
conversation is rendered a second time with markers in their place: what lies between the same
surroundings in the real prompt are the words. The markers are characters for private use, which
templates have no reason to touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

from calibrators.interface import Span

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.renderers import ChatParams


@dataclass(slots=True)
class Wording:
    """The last user message's texts as spans of characters of the rendered prompt.

    Attributes:
        sought: whether anybody needs to know; images are looked for in any case.
        spans: in order; None while unknown, or where they cannot be told from their surroundings.
    """

    sought: bool = True
    spans: tuple[Span, ...] | None = None


_WANTED: ContextVar[Wording | None] = ContextVar("trimtab_wording", default=None)


@contextmanager
def wanted(words: bool = True) -> Iterator[Wording]:
    """Have the chats that this context renders looked at, the words in them where they matter."""
    wording = Wording(words)
    token = _WANTED.set(wording)
    try:
        yield wording
    finally:
        _WANTED.reset(token)


def current() -> Wording | None:
    """What was found in this context; None where nobody wanted it."""
    return _WANTED.get()


def look_for(engine_client: EngineClient) -> None:
    """Look for the words wherever they are wanted, as chats are rendered."""
    renderer = engine_client.renderer
    if not isinstance(renderer, HfRenderer):
        return
    render = renderer.render_messages_async

    async def looked_at(messages: Any, params: ChatParams) -> Any:  # noqa: ANN401
        conversation, prompt = await render(messages, params)
        wording, text = _WANTED.get(), prompt.get("prompt")
        if wording is not None and wording.sought and isinstance(text, str):
            arguments = params.get_apply_chat_template_kwargs()

            def again(marked: list[Any]) -> object:
                tokenizer = renderer.get_tokenizer()
                return safe_apply_chat_template(
                    renderer.model_config, tokenizer, marked, **arguments
                )

            wording.spans = find(conversation, messages, text, again)
        return conversation, prompt

    renderer.render_messages_async = looked_at


def find(
    conversation: Sequence[Mapping[str, Any]],
    messages: Sequence[Mapping[str, Any]],
    prompt: str,
    render: Callable[[list[Any]], object],
) -> tuple[Span, ...] | None:
    """The words of the last user message in `prompt`; None where they cannot be found.

    Args:
        conversation: messages as the template gets them.
        messages: the same as the client sent them.
        prompt: the conversation rendered.
        render: renders a conversation.
    """
    index = max((i for i, m in enumerate(conversation) if m.get("role") == "user"), default=None)
    if index is None or len(conversation) != len(messages):
        return None
    content, texts = conversation[index].get("content"), _texts(messages[index].get("content"))
    marks = [f"\ue000{number}\ue001" for number in range(len(texts))]
    marked = _marked(content, texts, marks)
    if marked is None:
        return None
    changed = [dict(m) for m in conversation]
    changed[index]["content"] = marked
    try:
        surroundings = render(changed)
    except VLLMValidationError:
        return None
    return _between(prompt, surroundings, texts, marks)


def _texts(content: object) -> list[str]:
    """The texts of a message's content, as the client sent them; empty ones cannot be marked."""
    if isinstance(content, str):
        return [content] if content else []
    parts = content if isinstance(content, list) else []
    texts = [part if isinstance(part, str) else part.get("text") for part in parts]
    return [text for text in texts if isinstance(text, str) and text]


def _marked(content: object, texts: list[str], marks: list[str]) -> object:
    """Content with marks in place of its texts; None where they are not found in it."""
    if isinstance(content, str):
        # Placeholders of images stand among them: from the end, since they usually come first.
        end = len(content)
        for text, mark in zip(reversed(texts), reversed(marks), strict=True):
            start = content.rfind(text, 0, end)
            if start < 0:
                return None
            content, end = content[:start] + mark + content[start + len(text) :], start
        return content
    if not isinstance(content, list):
        return None
    left = list(zip(texts, marks, strict=True))
    parts: list[object] = []
    for part in content:
        if left and isinstance(part, dict) and part.get("text") == left[0][0]:
            parts.append({**part, "text": left.pop(0)[1]})
        else:
            parts.append(part)
    return None if left else parts


def _between(
    prompt: str, surroundings: object, texts: list[str], marks: list[str]
) -> tuple[Span, ...] | None:
    """Where the texts are if `prompt` is `surroundings` with them in place of their marks."""
    if not isinstance(surroundings, str) or any(surroundings.count(mark) != 1 for mark in marks):
        return None
    spans: list[Span] = []
    position, rest = 0, surroundings
    for number, (text, mark) in enumerate(zip(texts, marks, strict=True)):
        before, _, rest = rest.partition(mark)
        after = rest.partition(marks[number + 1])[0] if number + 1 < len(marks) else rest
        start = position + len(before)
        # Templates strip what they are given, or not.
        forms = (text, text.strip(), text.lstrip(), text.rstrip())
        form = next((f for f in forms if prompt.startswith(f + after, start)), None)
        if form is None or not prompt.startswith(before, position):
            return None
        position = start + len(form)
        spans.append(Span(start, position))
    return tuple(spans) if prompt[position:] == rest else None
