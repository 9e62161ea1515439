"""`POST /v1/chat/completions` and `POST /v1/completions`.

Plain requests go straight to vLLM's handlers. Calibrated ones are admitted first, carry a
ticket through the engine, and come back with a receipt.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server.admission import Admitted, Refusal
from server.aliases import answered_as
from server.engine import wording
from server.engine.payload import KEY
from server.errors import INVALID_CALIBRATION, ApiError, envelope, in_our_envelope, replaced
from server.front_end import FrontEnd
from server.middleware.request_id import SCOPE, Identity
from server.middleware.request_log import REJECTED, record_of
from server.receipts import NotApplied, Receipt
from server.routes.requests import CalibratedChatRequest, CalibratedCompletionRequest

HEADER = "X-Calibration"
# How a finish reason looks in vLLM's chunks. Inside a string the quotes would be escaped.
FINISHED = '"finish_reason":"'

AnyRequest: TypeAlias = CalibratedChatRequest | CalibratedCompletionRequest
Handler: TypeAlias = Callable[[Any, Request], Awaitable[Response | None]]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = frozenset({CHAT, COMPLETIONS})

router = APIRouter()


@router.post(CHAT, dependencies=[Depends(validate_json_request)])
async def create_chat_completion(request: CalibratedChatRequest, raw_request: Request) -> Any:  # noqa: ANN401 - FastAPI would take a response class for a schema
    """Chat completion, calibrated if the request or the server's default says so."""
    return await answer(request, raw_request, chat.create_chat_completion)


@router.post(COMPLETIONS, dependencies=[Depends(validate_json_request)])
async def create_completion(request: CalibratedCompletionRequest, raw_request: Request) -> Any:  # noqa: ANN401
    """Text completion, calibrated if the request or the server's default says so."""
    return await answer(request, raw_request, completion.create_completion)


async def answer(request: AnyRequest, raw_request: Request, handler: Handler) -> Response | None:
    """Run vLLM's `handler`, with calibration around it where one was admitted."""
    front_end: FrontEnd = raw_request.app.state.trimtab
    settle_id(request, raw_request.scope.get(SCOPE))
    name = request.model or ""
    alias = front_end.aliases.get(name)
    if alias is None:
        return await _answer(request, raw_request, handler, front_end)
    request.model = alias.model
    if request.calibration is None:
        request.calibration = alias.preset
    return answered_as(await _answer(request, raw_request, handler, front_end), name)


def settle_id(request: AnyRequest, identity: Identity | None) -> None:
    """One id for answer, header and log: of the header, else of the body, else made up.

    Args:
        request: vLLM takes the id of the body from here where there is no header.
        identity: of the scope.
    """
    if identity is None or identity.given:
        return
    if "request_id" in request.model_fields_set:
        identity.value = request.request_id
    else:
        request.request_id = identity.value


async def _answer(
    request: AnyRequest, raw_request: Request, handler: Handler, front_end: FrontEnd
) -> Response | None:
    try:
        admitted = front_end.admission.admit(request.calibration)
        check_honourable(request, admitted)
        if admitted is None:
            return _unified(await handler(request, raw_request))
        request.cache_salt = front_end.cache_salt(admitted, request.cache_salt, raw_request)
        record = record_of(raw_request.scope)
        record.methods, record.digest = "+".join(admitted.methods), admitted.short_digest
        receipt = front_end.open(admitted, request.n or 1, record)
        request.calibrate_with(lambda: front_end.desk.issue(receipt))
        with wording.wanted(admitted.question) if admitted.vision else nullcontext():
            return await calibrated(request, raw_request, handler, receipt)
    except Refusal as refusal:
        front_end.metrics.refused(refusal)
        record_of(raw_request.scope).outcome = REJECTED
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            refusal.message,
            param=refusal.param,
            code=INVALID_CALIBRATION,
        ) from None


def check_honourable(request: AnyRequest, admitted: Admitted | None) -> None:
    """Refuse what calibration cannot go together with.

    Raises:
        Refusal: names the other field.
    """
    if request.vllm_xargs and KEY in request.vllm_xargs:
        raise Refusal(
            "unsupported_feature",
            f"vllm_xargs.{KEY}",
            f'the key "{KEY}" of vllm_xargs is reserved; use the field calibration',
        )
    if admitted is None:
        return
    fields = {
        "use_beam_search": request.use_beam_search,
        "kv_transfer_params": request.kv_transfer_params,
    }
    for name, value in fields.items():
        if value:
            raise Refusal(
                "unsupported_feature",
                name,
                f"{name} cannot be combined with calibration; leave out one of them",
                admitted.methods[0],
            )


async def calibrated(
    request: AnyRequest, raw_request: Request, handler: Handler, receipt: Receipt
) -> Response | None:
    """Answer a calibrated request; its receipt is closed when the last byte is out.

    Raises:
        Refusal: its prompt, known only now, cannot be calibrated as asked.
    """
    front_end: FrontEnd = raw_request.app.state.trimtab
    settled = False
    answered = False
    try:
        response = _unified(await handler(request, raw_request))
        if isinstance(response, StreamingResponse):
            response = ReceiptedStream(response, front_end, receipt)
            settled = True
        elif isinstance(response, JSONResponse) and response.status_code == HTTPStatus.OK:
            response, answered = _with_receipt(response, receipt)
        if response is not None and response.status_code == HTTPStatus.OK:
            response.headers[HEADER] = receipt.admitted.header
        return response
    except Refusal:
        front_end.withdraw(receipt)
        settled = True
        raise
    finally:
        if not settled:
            front_end.close(receipt, answered=answered)


def _unified(response: Response | None) -> Response | None:
    return None if response is None else in_our_envelope(response)


def _with_receipt(response: JSONResponse, receipt: Receipt) -> tuple[JSONResponse, bool]:
    """The answer with its receipt, or the error in its place; and whether it is the answer."""
    content = json.loads(bytes(response.body))
    try:
        content["calibration"] = receipt.document()
    except NotApplied as error:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        return replaced(response, _not_applied(error), status), False
    return replaced(response, content, HTTPStatus.OK), True


def _not_applied(error: NotApplied) -> dict[str, Any]:
    return envelope(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), code="calibration_not_applied")


class ReceiptedStream(StreamingResponse):
    """vLLM's stream, with the receipt in the chunk that finishes its last choice.

    The receipt is closed however the stream ends, also where the client is gone before the body
    begins: a generator that never started runs no `finally`.
    """

    def __init__(self, stream: StreamingResponse, front_end: FrontEnd, receipt: Receipt) -> None:
        super().__init__(
            self._stamped(stream.body_iterator),
            stream.status_code,
            headers=stream.headers,
            background=stream.background,
        )
        self._front_end = front_end
        self._receipt = receipt
        self._answered = False
        self._closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._front_end.close(self._receipt, answered=self._answered)

    async def _stamped(self, chunks: AsyncIterable[Any]) -> AsyncIterator[str]:
        finished = 0
        try:
            async for chunk in chunks:
                if FINISHED in chunk:
                    finished += chunk.count(FINISHED)
                    if finished == self._receipt.expected_choices:
                        chunk = _stamp(chunk, self._receipt)
                        self._answered = True
                yield chunk
        except NotApplied as error:
            yield f"data: {json.dumps(_not_applied(error))}\n\ndata: [DONE]\n\n"
        finally:
            self._close()


def _stamp(chunk: str, receipt: Receipt) -> str:
    prefix = "data: "
    content = json.loads(chunk.removeprefix(prefix))
    content["calibration"] = receipt.document()
    return f"{prefix}{json.dumps(content, separators=(',', ':'))}\n\n"
