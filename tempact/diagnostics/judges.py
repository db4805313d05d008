"""`python -m tempact.doctor judges`: one canned plan and one canned video to every judge of the environment."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from tempact.diagnostics import FAULT, NOTE, OK
from tempact.errors import UserError
from tempact.rewards.judged import HELD_OUT, INSTRUCTION, PLAN, STEP, VIDEO, JudgedReward, canned
from tempact.rewards.judges import JudgeOutage
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import PREFIX, ROLES, EndpointConfig, JudgeConfig, import_openai
from tempact.types import Missing

CONNECTING_S = 3.0
SHOWN_MODELS = 5
SHOWN_CHARACTERS = 400  # of what a server says is wrong
LEAST_SCORE = 0.5  # the canned plan is right and the canned video follows it


@dataclass(frozen=True)
class Answer:
    """A server's score in [0, 1], or the reason why there is none, after `seconds`."""

    score: float
    seconds: float
    reason: str = ""


def findings(timeout_s: float, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Status and line of every role and server, one after the other. Keys are not shown.

    The roles are those of training, and the held-out judge if the environment has an address of its own for it.
    """
    given = os.environ if environment is None else environment
    held_out = given.get(f"{PREFIX}{HELD_OUT.upper()}_BASE_URL", "").strip()
    for role, fallback in (ROLES | ({HELD_OUT: ""} if held_out else {})).items():
        try:
            config = JudgeConfig.from_environment({role: fallback}, environment=given)
        except UserError as error:
            yield FAULT, f"judge {role}: {error}"
            continue
        for endpoint in config.roles[role]:
            where = f"judge {role}: {endpoint.shown}, {endpoint.model}"
            try:
                answer = ask(role, endpoint, timeout_s)
            except UserError as error:  # the package openai is not there
                yield FAULT, f"judge {role}: {error}"
                continue
            if answer.reason:
                reason = " ".join(config.redact(answer.reason).split())[:SHOWN_CHARACTERS]
                yield FAULT, f"{where}: no score after {answer.seconds:.1f} s: {reason}"
            elif answer.score < LEAST_SCORE:
                found = f"score {answer.score:.2f} in {answer.seconds:.1f} s"
                yield NOTE, f"{where}: {found}; what is sent deserves {LEAST_SCORE} or more: is it the model you meant?"
            else:
                yield OK, f"{where}: score {answer.score:.2f} in {answer.seconds:.1f} s"


def ask(role: str, endpoint: EndpointConfig, timeout_s: float) -> Answer:
    """One call to one server, without retries and without the cache, through the reward that a run would use."""
    started = time.monotonic()

    def answer(score: float, reason: str) -> Answer:
        return Answer(score, time.monotonic() - started, reason)

    if reason := why_unreachable(endpoint.base_url):
        return answer(float("nan"), reason)
    config = JudgeConfig(
        {role: (endpoint,)}, deadline_s=timeout_s, attempt_s=timeout_s, outage_s=2 * timeout_s, attempts=1
    )
    with JudgeClient(config) as client:  # says so if the package openai is not there
        if reason := why_not_served(endpoint, timeout_s):
            return answer(float("nan"), reason)
        started = time.monotonic()
        question = {each.name: each for each in (PLAN, STEP)}.get(role, VIDEO)
        scores = JudgedReward(client, question, role=role)([INSTRUCTION], *canned())
        try:
            score = float(scores.result().flatten()[0])
        except JudgeOutage as error:
            return answer(float("nan"), str(error))
    results = [reply.result() for reply in scores.replies.values()]
    return answer(score, "; ".join(result.reason for result in results if isinstance(result, Missing)))


def why_unreachable(address: str) -> str:
    """The reason why no connection can be made to an address, "" if one can or if a proxy stands between.

    It takes CONNECTING_S at most for each of the host's addresses, where the client would wait for an outage.
    """
    parts = urlsplit(address)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), CONNECTING_S).close()
    except OSError as error:
        return (
            f"nothing answers at {parts.hostname}:{port} ({error.strerror or error}); start the server (docs/judges.md)"
        )
    return ""


def why_not_served(endpoint: EndpointConfig, timeout_s: float) -> str:
    """The reason why the server will not judge with this key and model, "" if none is known.

    The client would go on asking until an outage, as it must during a run. A server that lists no models passes.
    """
    openai = import_openai()

    async def listed() -> list[str]:
        async with endpoint.connect(timeout_s) as server:
            return [model.id for model in (await server.models.list()).data or []]

    try:
        served = asyncio.run(listed())
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        return f"HTTP {error.status_code}: {error.message}; correct the API_KEY of this address"
    except (openai.OpenAIError, ValueError, AttributeError):
        return ""
    if not served or endpoint.model in served:
        return ""
    shown = ", ".join(served[:SHOWN_MODELS]) + (", ..." if len(served) > SHOWN_MODELS else "")
    return f"the server has no model {endpoint.model}; it serves {shown}"
