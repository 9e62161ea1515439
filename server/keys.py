"""The API keys of a server."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from vllm import envs

from server.settings import Settings


class KeyFileError(Exception):
    """A key file cannot be used; the message says why, without what is in it."""


def configured(args: Namespace, settings: Settings) -> tuple[str, ...]:
    """All keys: of `--api-key`, else of `VLLM_API_KEY`, as vLLM has it, and of the key file.

    Raises:
        KeyFileError: the file cannot be read, or holds no key.
    """
    named = getattr(args, "api_key", None) or [envs.VLLM_API_KEY]
    filed = read(settings.api_key_file) if settings.api_key_file else []
    return tuple(dict.fromkeys(key for key in (*named, *filed) if key))


def read(file: str) -> list[str]:
    """Keys of a file: one per line; empty lines and lines that begin with # say nothing.

    Raises:
        KeyFileError: it cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyFileError(f"--api-key-file {file}: {reason}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        # An empty file is more likely a mistake than the wish for an open server.
        raise KeyFileError(f"--api-key-file {file} holds no key")
    if any(len(key.split()) > 1 for key in keys):
        raise KeyFileError(f"--api-key-file {file}: a key may not contain spaces")
    return keys
