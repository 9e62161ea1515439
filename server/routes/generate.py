"""`POST /v1/chat/completions` and `POST /v1/completions`.

Plain requests go straight to vLLM's handlers. Calibrated ones are admitted first, carry a
ticket through the engine, and come back with a receipt.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server.admission import Admitted, Refusal
from server.engine.payload import KEY
from server.errors import INVALID_CALIBRATION, ApiError, envelope
from server.front_end import FrontEnd
from server.receipts import NotApplied, Receipt
from server.routes.requests import CalibratedChatRequest, CalibratedCompletionRequest

HEADER = "X-Calibration"
# How a finish reason looks in vLLM's chunks. Inside a string the quotes would be escaped.
FINISHED = '"finish_reason":"'

AnyRequest: TypeAlias = CalibratedChatRequest | CalibratedCompletionRequest
Handler: TypeAlias = Callable[[Any, Request], Awaitable[Response | None]]

router = APIRouter()


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
async def create_chat_completion(request: CalibratedChatRequest, raw_request: Request) -> Any:  # noqa: ANN401 - FastAPI would take a response class for a schema
    """Chat completion, calibrated if the request or the server's default says so."""
    return await answer(request, raw_request, chat.create_chat_completion)


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)])
async def create_completion(request: CalibratedCompletionRequest, raw_request: Request) -> Any:  # noqa: ANN401
    """Text completion, calibrated if the request or the server's default says so."""
    return await answer(request, raw_request, completion.create_completion)


async def answer(request: AnyRequest, raw_request: Request, handler: Handler) -> Response | None:
    """Run vLLM's `handler`, with calibration around it where one was admitted."""
    front_end: FrontEnd = raw_request.app.state.trimtab
    try:
        admitted = front_end.admission.admit(request.calibration)
        check_honourable(request, admitted)
    except Refusal as refusal:
        front_end.metrics.refused(refusal)
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            refusal.message,
            param=refusal.param,
            code=INVALID_CALIBRATION,
        ) from None
    if admitted is None:
        return await handler(request, raw_request)
    request.cache_salt = front_end.cache_salt(admitted, request.cache_salt, raw_request)
    receipt = front_end.open(admitted, request.n or 1)
    request.calibrate_with(lambda: front_end.desk.issue(receipt))
    return await calibrated(request, raw_request, handler, receipt)


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
    """Answer a calibrated request; its receipt is closed when the last byte is out."""
    front_end: FrontEnd = raw_request.app.state.trimtab
    streaming = False
    answered = False
    try:
        response = await handler(request, raw_request)
        if isinstance(response, StreamingResponse):
            streaming = True
            response.body_iterator = _stamped(response.body_iterator, front_end, receipt)
        elif isinstance(response, JSONResponse) and response.status_code == HTTPStatus.OK:
            response = _with_receipt(response, receipt)
            answered = True
        if response is not None:
            response.headers[HEADER] = receipt.admitted.header
        return response
    except NotApplied as error:
        raise ApiError(
            HTTPStatus.INTERNAL_SERVER_ERROR, str(error), code="calibration_not_applied"
        ) from None
    finally:
        if not streaming:
            front_end.close(receipt, answered=answered)


def _with_receipt(response: JSONResponse, receipt: Receipt) -> JSONResponse:
    content = json.loads(bytes(response.body))
    content["calibration"] = receipt.document()
    kept = {k: v for k, v in response.headers.items() if k != "content-length"}
    return JSONResponse(content, response.status_code, headers=kept)


async def _stamped(
    chunks: AsyncIterable[Any], front_end: FrontEnd, receipt: Receipt
) -> AsyncIterator[str]:
    """The stream, with the receipt in the chunk that finishes its last choice."""
    finished, answered = 0, False
    try:
        async for chunk in chunks:
            if FINISHED in chunk:
                finished += chunk.count(FINISHED)
                if finished == receipt.expected_choices:
                    chunk = _stamp(chunk, receipt)
                    answered = True
            yield chunk
    except NotApplied as error:
        body = envelope(
            HTTPStatus.INTERNAL_SERVER_ERROR, str(error), code="calibration_not_applied"
        )
        yield f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n"
    finally:
        front_end.close(receipt, answered=answered)


def _stamp(chunk: str, receipt: Receipt) -> str:
    prefix = "data: "
    content = json.loads(chunk.removeprefix(prefix))
    content["calibration"] = receipt.document()
    return f"{prefix}{json.dumps(content, separators=(',', ':'))}\n\n"
