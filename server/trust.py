"""What of a request would act as code, name a file or choose how much work is done.

All of it is refused unless the operator says otherwise, with vLLM's own flags where it has them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from server.bounds import parts
from server.errors import ApiError
from server.settings import Settings

NOT_ALLOWED = "not_allowed"
EMBEDS = "_embeds"
URLS = ("image_url", "video_url", "audio_url")


@dataclass(frozen=True, slots=True)
class Trust:
    """What requests may bring along.

    Attributes:
        chat_template: a template of their own, with any arguments.
        template_kwargs: arguments of the server's template, by name.
        mm_kwargs: options of image and video processing.
        embeds: tensors in place of a prompt or of images.
        remote_media: images and others to be fetched from allowed hosts.
        local_media: images and others in the allowed folder.
    """

    chat_template: bool = False
    template_kwargs: frozenset[str] = frozenset()
    mm_kwargs: bool = False
    embeds: bool = False
    remote_media: bool = False
    local_media: bool = False

    @classmethod
    def from_args(cls, args: Namespace, settings: Settings) -> Trust:
        """What vLLM's flags and ours say."""

        def said(name: str) -> bool:
            return bool(getattr(args, name, None))

        defaults = getattr(args, "default_chat_template_kwargs", None) or {}
        return cls(
            chat_template=said("trust_request_chat_template"),
            template_kwargs=frozenset((*settings.allowed_chat_template_kwargs, *defaults)),
            mm_kwargs=said("trust_request_mm_kwargs"),
            embeds=said("enable_prompt_embeds") or said("enable_mm_embeds"),
            remote_media=said("allowed_media_domains"),
            local_media=said("allowed_local_media_path"),
        )

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse what is not trusted.

        Raises:
            ApiError: 400; names the field and the flag.
        """
        if not self.chat_template:
            _refuse(body, "chat_template", "--trust-request-chat-template")
            self._check_template_kwargs(body.get("chat_template_kwargs"))
        if not self.mm_kwargs:
            _refuse(body, "mm_processor_kwargs", "--trust-request-mm-kwargs")
            _refuse(body, "media_io_kwargs", "--trust-request-mm-kwargs")
        if not self.embeds:
            _refuse(body, "prompt_embeds", "--enable-prompt-embeds")
        for field in ("messages", "input"):
            for part in parts(body.get(field)):
                self._check_part(field, part)

    def _check_template_kwargs(self, given: object) -> None:
        if not isinstance(given, dict):
            return
        for name, value in given.items():
            param = f"chat_template_kwargs.{name}"
            if name not in self.template_kwargs:
                known = ", ".join(sorted(self.template_kwargs)) or "none"
                raise _error(param, f"allowed are {known}; see --allowed-chat-template-kwargs")
            if isinstance(value, dict | list) or (isinstance(value, str) and len(value) > 64):
                raise _error(param, "allowed are booleans, numbers and words")

    def _check_part(self, field: str, part: Mapping[str, Any]) -> None:
        kind = part.get("type")
        named = any(name.endswith(EMBEDS) for name in part)
        if not self.embeds and (named or (isinstance(kind, str) and kind.endswith(EMBEDS))):
            raise _error(field, "tensors need --enable-prompt-embeds or --enable-mm-embeds")
        for name in URLS:
            value = part.get(name)
            self._check_url(field, value.get("url") if isinstance(value, dict) else value)
        if kind == "url":
            self._check_url(field, part.get("url"))

    def _check_url(self, field: str, value: object) -> None:
        if not isinstance(value, str):
            return
        scheme = value[:16].partition(":")[0].strip().lower()
        if scheme == "data" or (scheme == "file" and self.local_media):
            return
        if scheme == "file":
            raise _error(field, "files of the server need --allowed-local-media-path")
        if not self.remote_media:
            raise _error(field, "media by address need --allowed-media-domains; send a data: URL")


def _refuse(body: Mapping[str, Any], field: str, flag: str) -> None:
    if body.get(field):
        raise _error(field, f"this server does not take it; see {flag}")


def _error(param: str, rule: str) -> ApiError:
    return ApiError(
        HTTPStatus.BAD_REQUEST, f"{param} is refused: {rule}", param=param, code=NOT_ALLOWED
    )
