"""What a judge is asked for, and strict reading of its replies: a reply is exactly as asked for, or no reply.

Nothing is guessed or repaired: where a reply holds two objects, or one inside a sentence, its numbers may come from the
judge or from the plan that it quotes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Set
from functools import cache
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from tempact.rewards.judges import TOKENS
from tempact.rewards.judges.config import JudgeConfig

MAX_REPLY_CHARACTERS = 65_536
RESPONSE_FORMAT = "response_format"
MAX_TOKENS = ("max_tokens", "max_completion_tokens")  # servers know one of them or both
WORDS = {RESPONSE_FORMAT: (RESPONSE_FORMAT, "schema", "grammar", "structured")}  # a refusal of a field has one of them
TOO_LONG = re.compile(r"context[\W_]+(?:length|window|size|limit)", re.IGNORECASE)  # an error of a call, of no field
THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
REASONING = ("reasoning_content", "reasoning")  # where servers put what a reasoning parser has taken for thoughts
WRAPPERS = (("<|begin_of_box|>", "<|end_of_box|>"), ("<answer>", "</answer>"), ("<output>", "</output>"),
            ("<json>", "</json>"), ("\\boxed{", "}"))  # fmt: skip
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")  # not always taken away
_FENCED = re.compile(r"```(?:json)?\s(.*?)\s*```", re.DOTALL | re.IGNORECASE)


class BadReply(ValueError):
    """The judge has answered in another form than asked for."""


class BadBody(ValueError):
    """The server has sent no chat completion: the server's fault, not the judge's. status: an HTTP status, if any."""

    def __init__(self, reason: str, status: int = 0):
        super().__init__(reason)
        self.status = status


def optional_fields(config: JudgeConfig, fields: type[BaseModel], not_taken: Set[str]) -> dict[str, Any]:
    """Fields of a request that some servers do not take, by name, without those in `not_taken`."""
    names = dict.fromkeys((config.max_tokens_name, *MAX_TOKENS)) if config.max_tokens_name else ()
    wanted: dict[str, Any] = {name: config.max_tokens for name in [name for name in names if name not in not_taken][:1]}
    if config.temperature_name:
        wanted[config.temperature_name] = config.temperature
    if config.schemas:
        wanted[RESPONSE_FORMAT] = response_format(fields)
    return {name: value for name, value in wanted.items() if name not in not_taken}


@cache
def response_format(fields: type[BaseModel]) -> dict[str, Any]:
    """A request for a reply of `fields`: all of them, and no others, which is what strict servers insist on."""
    told = {name: value for name, value in fields.model_json_schema().items() if name not in ("title", "description")}
    strict = told | {"required": list(told["properties"]), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": fields.__name__, "strict": True, "schema": strict}}


def refused_fields(sent: Set[str], told: str) -> set[str]:
    """The optional fields that an error of the server names; none where a call was too long."""
    if TOO_LONG.search(told):
        return set()
    return {name for name in sent if any(re.search(rf"\b{word}", told) for word in WORDS.get(name, (name,)))}


def doubted_fields(sent: Set[str], told: str) -> set[str]:
    """Those that an error which names none may be about: a server that says nothing of it may know no schemas."""
    return set() if TOO_LONG.search(told) else {RESPONSE_FORMAT} & sent


def read_completion(body: bytes, fields: type[BaseModel]) -> BaseModel:
    """The reply in a chat completion's first choice, checked against `fields` (`read_reply`).

    Raises BadBody if the body is no chat completion, BadReply if the judge refused, said nothing or something else.
    """
    try:
        completion = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"body is not JSON ({_cut(str(error))})") from error
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _no_completion(completion) from error
    if refusal:
        raise BadReply("the judge refused")
    text, thoughts = _text(content), next((message[name] for name in REASONING if message.get(name)), None)
    cut = choice.get("finish_reason") == "length"
    if text.strip():
        try:
            return read_reply(text, fields)
        except BadReply as error:
            if not cut:
                raise
            raise BadReply(f"the reply was cut off ({error}); accepted: a larger judges.max_tokens") from error
    if cut:
        raise BadReply("the reply is empty and was cut off; accepted: a larger judges.max_tokens, or less thinking")
    if not isinstance(thoughts, str):
        raise BadReply("the reply is empty")
    try:
        return read_reply(thoughts, fields)
    except BadReply as error:
        flag = "a server without --reasoning-parser, or with the one of this model"
        raise BadReply(f"the reply is empty and all text is in its reasoning ({error}); accepted: {flag}") from error


def read_usage(body: bytes) -> dict[str, int]:
    """Tokens that a chat completion says were used, by name of TOKENS; nothing where it does not say so. Of thoughts
    and of the server's prompt cache are parts of the others."""
    try:
        told = json.loads(body)["usage"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    if not isinstance(told, dict):
        return {}
    details = told | {
        name: part
        for group in ("completion_tokens_details", "prompt_tokens_details")
        if isinstance(told.get(group), dict)
        for name, part in told[group].items()
        if name in TOKENS
    }
    return {name: details[name] for name in TOKENS if type(details.get(name)) is int and details[name] > 0}


def _no_completion(completion: Any) -> BadBody:
    """Some routers send their errors with status 200."""
    told = completion.get("error") if isinstance(completion, dict) else None
    code = told.get("code") if isinstance(told, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 0
    return BadBody(f"body is no chat completion{f' ({_cut(json.dumps(told))})' if told else ''}", status)


def _text(content: Any) -> str:
    """The text of a message, which may come in parts; parts that hold thoughts are left out."""
    parts = content if isinstance(content, list) else [content or ""]
    texts = [
        part["text"]
        if isinstance(part, dict) and part.get("type") in ("text", "output_text") and "text" in part
        else part
        for part in parts
        if not (isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"))
    ]
    for text in texts:
        if not isinstance(text, str):
            raise BadReply(f"content holds {_cut(json.dumps(text))}; accepted: text")
    return "".join(texts)


def read_reply(text: str, fields: type[BaseModel]) -> BaseModel:
    """The one JSON object of a reply, checked against `fields`.

    Accepted around it: white space, a closed thinking block in front, one code fence, the pairs of WRAPPERS, each
    once, and end tokens. Numbers are JSON numbers (no strings, no booleans), finite and in the ranges of `fields`; a
    name that occurs twice is refused. Raises BadReply, and nothing else, whatever the text.
    """
    if len(text) > MAX_REPLY_CHARACTERS:
        raise BadReply(f"{len(text)} characters; accepted: at most {MAX_REPLY_CHARACTERS}")
    try:
        found = json.loads(
            _bare(_after_thinking(text.strip().removeprefix("\ufeff"))),
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
    """The text behind a thinking block. A block whose beginning is missing may be the plan's words, and is no block."""
    for opened, closed in THINKING:
        if text.startswith(opened):
            _, ended, answer = text.partition(closed)
            if not ended:
                raise BadReply("the thinking block is not closed: the reply was cut off")
            return answer
        if closed in text and not text.startswith(("{", "`")):
            parser = "a server that takes the thoughts out (vLLM: --reasoning-parser), or a judge that does not think"
            raise BadReply(f"text in front of {closed} without {opened}; accepted: {parser}")
    return text


def _bare(text: str) -> str:
    """The text without a fence, wrappers and end tokens around it."""
    left = list(WRAPPERS)
    while True:
        text, before = text.strip(), text
        for token in END_TOKENS:
            text = text.removesuffix(token)
        if fenced := _FENCED.fullmatch(text):
            text = fenced[1]
        for pair in [pair for pair in left if text.startswith(pair[0]) and text.endswith(pair[1])]:
            text = text.removeprefix(pair[0]).removesuffix(pair[1])
            left.remove(pair)
        if text == before:
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
