"""Requests to judges: their messages, and what it means where they bring no result."""

from __future__ import annotations

import base64
from collections.abc import Set
from typing import Any

from tempact.rewards.judges import JudgeCall

RETRIED = {408, 409, 425}  # and 5xx
TOO_MANY = 429  # and 5xx that say when to come again
UNUSABLE = {401, 403, 404}  # and 3xx: at a server that has never answered, a wrong key, address or model for any call
NO_CREDIT = 402
NO_CREDIT_CODES = ("insufficient_quota", "billing_", "insufficient_balance")  # of a 429 that no waiting ends
UNKNOWN_FIELD = {400, 422, 501}
GATEWAY = {502, 503, 504}  # nobody is behind the address


class Failed(Exception):
    """A request brought no result. free: it costs nothing, as it was refused or never received."""

    free = False


class Retry(Failed):
    """Another request may bring one.

    charged  the request counts as one of the call's attempts, before the next of which there is a pause
    pause_s  wait that the server asks for, s
    doubted  fields that the server may have refused the request for: it does not say so
    """

    def __init__(self, reason: str, charged: bool = True, pause_s: float = 0.0, doubted: Set[str] = frozenset()):
        super().__init__(reason)
        self.charged, self.pause_s, self.doubted = charged, pause_s, doubted


class Rejected(Failed):
    """The server refuses the call, and would refuse it again."""


def messages_of(call: JudgeCall) -> list[dict[str, Any]]:
    """Rubric and question as the messages of a chat; pictures are data URLs behind the text."""
    content: list[Any] = [{"type": "text", "text": _sendable(call.text)}]
    for image in call.images:
        url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    system = {"role": "system", "content": _sendable(call.rubric.system)}
    user = {"role": "user", "content": content if call.images else content[0]["text"]}
    return [system, user]


def _sendable(text: str) -> str:
    """The text without lone surrogates, which a plan may hold and UTF-8 has not."""
    return text.encode("utf-8", "replace").decode()
