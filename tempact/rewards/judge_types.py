"""What goes to a judge and what comes back; light on purpose: no network library is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pydantic import BaseModel

from tempact.types import Missing

JudgeResult: TypeAlias = BaseModel | Missing  # an instance of the call's `rubric.fields`, or why there is none


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked, in this project's words.

    system  the system message
    fields  the reply: a JSON object with these fields, all of them in range (`judge_schema.read_reply`)
    version a change of the wording is a new version: scores of two versions are not the same measurement
    """

    name: str
    version: str
    system: str
    fields: type[BaseModel]


@dataclass(frozen=True)
class JudgeCall:
    """One question to a judge.

    role        selects endpoints and model (`TEMPACT_JUDGE_<ROLE>_...`), and names the metrics `judge/<role>/...`
    text        the user message; what is quoted in it is quoted by the caller
    images      JPEG files, sent in this order after the text
    media_hash  of the images, any stable text; with `text`, rubric, model and parameters it is the key of the cache
    """

    role: str
    rubric: Rubric
    text: str
    images: tuple[bytes, ...] = ()
    media_hash: str = ""


class JudgeOutage(RuntimeError):
    """No endpoint of a role has answered for longer than `outage_s`: the run should save and stop."""
