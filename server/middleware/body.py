"""Reading a body ahead of the route, and handing it on."""

from __future__ import annotations

from starlette.types import Message, Receive

Messages = list[Message]


async def read(receive: Receive) -> Messages:
    """Everything up to the end of the body, or to the client's disconnection."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def content(messages: Messages) -> bytes:
    """The body in one piece."""
    return b"".join(message.get("body", b"") for message in messages)


def replay(messages: Messages, receive: Receive) -> Receive:
    """A `receive` that hands out `messages` before it goes on to what comes next."""
    pending = iter(messages)

    async def replayed() -> Message:
        message = next(pending, None)
        return message if message is not None else await receive()

    return replayed
