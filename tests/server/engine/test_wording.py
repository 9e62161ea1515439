import asyncio
from types import SimpleNamespace

import jinja2
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from calibrators.interface import Span
from server.engine import wording
from server.engine.wording import find

LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text + ' ' }}{% endfor %}{% endfor %}"
    "ASSISTANT:"
)
STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}A:"
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
PICKY = (
    "{% for m in messages %}{{ 'Q' if m.content.startswith('What') else 'S' }}"
    "{{ m.content }}{% endfor %}"
)
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def renderer(template):
    compiled = jinja2.Template(template)
    return lambda messages: compiled.render(messages=messages)


def words(template, conversation, messages=None):
    """The words found in the rendered conversation, as text; and that text."""
    render = renderer(template)
    prompt = render(conversation)
    spans = find(conversation, messages or conversation, prompt, render)
    return None if spans is None else [prompt[s.start : s.stop] for s in spans], prompt, spans


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, text("What is it?")], ["What is it?"]),
        ([text("What is it?"), IMAGE], ["What is it?"]),
        ([text("Here:"), IMAGE, text("and"), IMAGE, text("What?")], ["Here:", "and", "What?"]),
        ([text("A"), text("A")], ["A", "A"]),
        ([text("")], []),
        ([IMAGE], []),
        ([], []),
        ([text("SSISTANT: USER: {{ x }} <image>\n")], ["SSISTANT: USER: {{ x }} <image>\n"]),
        ([text(" spaced \n")], [" spaced \n"]),
    ],
)
def test_words_are_found_among_what_the_template_adds(content, expected):
    assert words(LLAVA, [user(content)])[0] == expected


def test_of_several_turns_the_last_users_words_count():
    conversation = [
        user([IMAGE, text("A")]),
        {"role": "assistant", "content": [text("A")]},
        user([text("A")]),
        {"role": "assistant", "content": [text("A")]},
    ]
    found, prompt, spans = words(LLAVA, conversation)
    assert found == ["A"]
    assert prompt[spans[0].start - 6 :] == "USER: A ASSISTANT: A ASSISTANT:"


def test_a_template_may_strip():
    found, _, spans = words(STRIPPING, [user("  Why? \n")])
    assert (found, spans) == (["Why?"], (Span(6, 10),))


@pytest.mark.parametrize(
    ("parts", "joined", "expected"),
    [
        (["image"], "<image>\nimage", ["image"]),
        (["What?", "Why?"], "<image>\nWhat?\nWhy?", ["What?", "Why?"]),
        (["a", "a"], "a\n<image>\na", ["a", "a"]),
        ("What?", "What?", ["What?"]),
        (["lost"], "something else", None),
    ],
)
def test_content_may_be_one_text_with_placeholders_in_it(parts, joined, expected):
    sent = parts if isinstance(parts, str) else [IMAGE, *map(text, parts)]
    assert words(STRIPPING, [user(joined)], [user(sent)])[0] == expected


@pytest.mark.parametrize("template", [TWICE, SHOUTING, PICKY])
def test_where_surroundings_depend_on_the_words_nothing_is_found(template):
    assert words(template, [user("What is it?")])[0] is None


def test_without_a_users_message_nothing_is_found():
    assert words(STRIPPING, [{"role": "system", "content": "Be brief."}])[0] is None


def test_a_template_that_refuses_markers_finds_nothing():
    def refuse(conversation):
        raise VLLMValidationError("no")

    assert find([user("a")], [user("a")], "a", refuse) is None


@pytest.fixture
def engine(monkeypatch):
    """An engine client whose renderer is vLLM's class, with a template and nothing else."""
    rendered = renderer(STRIPPING)
    monkeypatch.setattr(
        wording, "safe_apply_chat_template", lambda config, tokenizer, chat, **_: rendered(chat)
    )

    class Renderer(HfRenderer):
        model_config = None

        def __init__(self):
            self.calls = 0

        def get_tokenizer(self):
            return None

        async def render_messages_async(self, messages, params):
            self.calls += 1
            prompt = [1, 2] if params.ids else rendered(messages)
            return messages, {"prompt_token_ids" if params.ids else "prompt": prompt}

    return SimpleNamespace(renderer=Renderer())


def render(engine, ids=False):
    params = SimpleNamespace(ids=ids, get_apply_chat_template_kwargs=dict)

    async def run():
        # As vLLM does: in a task of its own.
        return await asyncio.gather(engine.renderer.render_messages_async([user("Hm?")], params))

    return asyncio.run(run())


def test_chats_are_looked_at_only_where_that_is_wanted(engine):
    wording.look_for(engine)
    render(engine)
    assert wording.current() is None
    with wording.wanted() as found:
        ((conversation, prompt),) = render(engine)
        assert wording.current() is found
    assert wording.current() is None
    assert found.spans == (Span(6, 9),)
    assert (conversation, prompt["prompt"][6:9]) == ([user("Hm?")], "Hm?")


def test_words_that_nobody_looks_at_are_not_looked_for(engine):
    wording.look_for(engine)
    with wording.wanted(words=False) as found:
        render(engine)
    assert found.spans is None


def test_a_prompt_that_is_rendered_to_tokens_is_left_alone(engine):
    wording.look_for(engine)
    with wording.wanted() as found:
        render(engine, ids=True)
    assert found.spans is None


def test_other_renderers_are_left_alone():
    engine = SimpleNamespace(renderer=SimpleNamespace(render_messages_async=None))
    wording.look_for(engine)
    assert engine.renderer.render_messages_async is None
