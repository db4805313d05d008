"""Strict reading of judges' replies: a reply is exactly as asked for, or no reply.

Nothing is guessed or repaired: where a reply holds two objects, or one inside a sentence, its numbers may come from the
judge or from the plan that it quotes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

MAX_REPLY_CHARACTERS = 65_536
THINKING = ("<think>", "</think>")
_FENCED = re.compile(r"```(?:json|JSON)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)


class BadReply(ValueError):
    """The judge has answered in another form than asked for."""


class BadBody(ValueError):
    """The server has sent no chat completion: the server's fault, not the judge's."""


def read_body(body: bytes) -> str:
    """The text of a chat completion's first choice.

    Raises BadBody if the body is no chat completion, BadReply if the judge refused or said nothing.
    """
    try:
        completion = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"body is not JSON ({_cut(str(error))})") from error
    try:
        message = completion["choices"][0]["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadBody("body is no chat completion") from error
    if refusal:
        raise BadReply("the judge refused")
    if content is not None and not isinstance(content, str):
        raise BadBody(f"content is {type(content).__name__}, not text")
    if not content:
        raise BadReply("the reply is empty")
    return content


def read_reply(text: str, fields: type[BaseModel]) -> BaseModel:
    """The one JSON object of a reply, checked against `fields`.

    Accepted around it: white space, a thinking block in front that is closed, one code fence. Numbers are JSON
    numbers (no strings, no booleans), finite and in the ranges of `fields`; a name that occurs twice is refused.
    Raises BadReply, and nothing else, whatever the text.
    """
    if len(text) > MAX_REPLY_CHARACTERS:
        raise BadReply(f"{len(text)} characters; accepted: at most {MAX_REPLY_CHARACTERS}")
    answer = _after_thinking(text).strip()
    fenced = _FENCED.fullmatch(answer)
    try:
        found = json.loads(
            fenced[1] if fenced else answer,
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except BadReply:
        raise
    except (ValueError, RecursionError) as error:
        raise BadReply(f"not one JSON object ({_cut(str(error))})") from error
    if not isinstance(found, dict):
        raise BadReply(f"a JSON {type(found).__name__}; accepted: an object")
    try:
        return fields.model_validate(found, strict=True)
    except (ValidationError, RecursionError, OverflowError) as error:
        raise BadReply(_first_fault(error)) from error


def _after_thinking(text: str) -> str:
    opened, closed = THINKING
    if closed in text:
        return text.rpartition(closed)[2]  # templates that open the block in the prompt send only its end
    if opened in text:
        raise BadReply("the thinking block is not closed: the reply was cut off")
    return text


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadReply("a name occurs twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise BadReply(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadReply(f"{_cut(digits)} is too large")
    return value


def _first_fault(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "nested too deeply or too large"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'reply'}: {_cut(first['msg'])}"


def _cut(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
