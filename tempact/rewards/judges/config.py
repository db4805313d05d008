"""Addresses, limits and connections of the judges. Addresses and keys come from the environment (docs/judges.md).

The address of the role temporal_following is TEMPACT_JUDGE_TEMPORAL_FOLLOWING_BASE_URL, else TEMPACT_JUDGE_BASE_URL,
else the name in the reference implementation, VLLM_BASE_URL; for roles without images the last is LLM_BASE_URL. An API
key is only ever taken from where its address was found, so that no key goes to another's server; nor does anything
that the environment holds for other clients of the package openai.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from tempact.config import JudgeSettings
from tempact.errors import UserError

# roles of training, and the prefix of the reference implementation's variables for them
ROLES = {"plan_quality": "LLM_", "temporal_following": "VLLM_", "step_following": "VLLM_"}
PREFIX = "TEMPACT_JUDGE_"
RAW = "x-stainless-raw-response"  # by this header the package knows that it is to leave a response as it is
NO_KEY = "none"  # the package openai insists on a key; it is not sent
FROM_SETTINGS = ("deadline_s", "attempt_s", "attempts", "outage_s", "max_tokens", "max_tokens_name", "temperature",
                 "temperature_name", "schemas", "max_calls")  # fmt: skip
HIDDEN = "***"


@dataclass(frozen=True)
class EndpointConfig:
    """One server: `concurrency` requests at a time, at most `requests_per_minute` (0: no limit)."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    concurrency: int = 16
    requests_per_minute: float = 0.0

    @property
    def shown(self) -> str:
        """Host and path, for messages."""
        parts = urlsplit(self.base_url)
        return f"{parts.netloc}{parts.path}"

    def connect(self, timeout_s: float) -> Any:
        """An `openai.AsyncOpenAI` that sends nothing but the request and this key, and follows no redirect.

        Raises UserError if the package openai is not installed.
        """
        openai = import_openai()

        async def strip(request: Any) -> None:
            """What else the package adds: OPENAI_ORG_ID, OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS, its telemetry."""
            headers = {"host": request.url.netloc.decode("ascii"), "accept": "application/json"}
            if request.content:
                headers |= {"content-type": "application/json", "content-length": str(len(request.content))}
            if RAW in request.headers:
                headers[RAW] = "true"
            if self.api_key:
                headers["authorization"] = f"Bearer {self.api_key}"
            request.headers = type(request.headers)(headers)

        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key or NO_KEY,
            organization="",  # None is that of the environment
            project="",
            max_retries=0,  # retries are counted by the client
            timeout=timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"request": [strip]}),
        )


@dataclass(frozen=True)
class JudgeConfig:
    """Endpoints of every role, and limits (ranges: `config.JudgeSettings`).

    deadline_s  for one call: requests, pauses between them and waiting for a next turn. It does not run while the
                call waits for its first turn (or the last calls of a large batch would be missing for the size of the
                batch: that wait ends because the calls ahead have deadlines), nor while every endpoint of its role is
                down (`outage_s` ends that)
    attempt_s   for one request, from sending it to the last byte of the answer
    attempts    requests of one call; a probe of an endpoint that was down is not counted
    outage_s    silence of all endpoints of a role, while calls wait for them, after which JudgeOutage is raised
    max_tokens  of a reply, thinking included; `max_tokens_name` is its field in a request, "" leaves it out
    temperature likewise
    schemas     replies are asked for by JSON schema, where the server takes one
    cache       SQLite file, None for no cache
    max_calls   requests that all clients with this `ledger` may send, 0 for any number: retries count, those that a
                server refuses or never receives do not
    ledger      file that counts requests and tokens, None to count nothing and to limit nothing

    Raises UserError for a role without endpoints or with several models.
    """

    roles: Mapping[str, tuple[EndpointConfig, ...]]
    deadline_s: float = 120.0
    attempt_s: float = 60.0
    attempts: int = 4
    backoff_s: float = 0.5  # before the second request; doubles, with jitter
    outage_s: float = 300.0
    max_tokens: int = 2048
    max_tokens_name: str = "max_tokens"
    temperature: float = 0.0
    temperature_name: str = "temperature"
    schemas: bool = True
    cache: Path | None = None
    max_calls: int = 0
    ledger: Path | None = None

    def divided(self, processes: int) -> JudgeConfig:
        """One process' part of every server's limits: `concurrency` at least 1, `requests_per_minute` exactly."""
        roles = {
            role: tuple(
                replace(
                    own,
                    concurrency=max(1, own.concurrency // processes),
                    requests_per_minute=own.requests_per_minute / processes,
                )
                for own in endpoints
            )
            for role, endpoints in self.roles.items()
        }
        return replace(self, roles=roles)

    def __post_init__(self) -> None:
        for role, endpoints in self.roles.items():
            if not endpoints or len({endpoint.model for endpoint in endpoints}) > 1:
                raise UserError(f"judges: {role}: accepted: one or more endpoints, all of one model")

    @classmethod
    def from_environment(
        cls,
        roles: Mapping[str, str] = ROLES,
        settings: JudgeSettings | None = None,
        environment: Mapping[str, str] | None = None,
        ledger: Path | None = None,
    ) -> JudgeConfig:
        """Endpoints of the given roles from the environment, limits from the configuration.

        roles  role to the prefix of its fallback names, "" for none
        ledger of the run that asks (`files.LEDGER`)

        BASE_URL may list several servers, separated by commas; MODEL is one name for all; API_KEY, CONCURRENCY and
        REQUESTS_PER_MINUTE are one for all or one each. Raises UserError that names the variable, never its key.
        """
        found = os.environ if environment is None else environment
        given = settings or JudgeSettings()
        return cls(
            {role: _endpoints(role, fallback, found) for role, fallback in roles.items()},
            **{key: getattr(given, key) for key in FROM_SETTINGS},
            cache=Path(given.cache) if given.cache else None,
            ledger=ledger,
        )

    def redact(self, text: str) -> str:
        """The text with HIDDEN in the place of every API key."""
        for endpoint in {endpoint for endpoints in self.roles.values() for endpoint in endpoints}:
            if endpoint.api_key:
                text = text.replace(endpoint.api_key, HIDDEN)
        return text


def _endpoints(role: str, fallback: str, environment: Mapping[str, str]) -> tuple[EndpointConfig, ...]:
    own = f"{PREFIX}{role.upper()}_"
    prefixes = [prefix for prefix in (own, PREFIX, fallback) if prefix]

    def value(prefix: str, name: str) -> str:
        return environment.get(prefix + name, "").strip()

    group = next((prefix for prefix in prefixes if value(prefix, "BASE_URL")), None)
    if group is None:
        accepted = ", ".join(f"{prefix}BASE_URL" for prefix in prefixes)
        raise UserError(f"environment: found no address of the judge {role}; accepted: {accepted}")
    addresses = _listed(value(group, "BASE_URL"))
    model_prefixes = dict.fromkeys((own, PREFIX, group))
    model = next((value(prefix, "MODEL") for prefix in model_prefixes if value(prefix, "MODEL")), "")
    if not model:
        raise UserError(f"{group}MODEL: found nothing; accepted: the name that {group}BASE_URL serves")
    if "," in model:
        raise UserError(f"{group}MODEL: found {model!r}; accepted: one name, served by every endpoint of {role}")

    def each(name: str) -> list[str]:
        listed = _listed(value(group, name))
        if len(listed) not in (0, 1, len(addresses)):
            raise UserError(f"{group}{name}: found {len(listed)} values; accepted: one, or {len(addresses)}")
        return listed * len(addresses) if len(listed) == 1 else listed or [""] * len(addresses)

    rows = zip(addresses, each("API_KEY"), each("CONCURRENCY"), each("REQUESTS_PER_MINUTE"), strict=True)
    return tuple(
        EndpointConfig(
            _address(f"{group}BASE_URL", address),
            model,
            _key(f"{group}API_KEY", key),
            int(_number(f"{group}CONCURRENCY", slots, EndpointConfig.concurrency, whole=True)),
            _number(f"{group}REQUESTS_PER_MINUTE", rate, EndpointConfig.requests_per_minute, whole=False),
        )
        for address, key, slots, rate in rows
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _address(name: str, address: str) -> str:
    accepted = "http://host:port/v1 or https://..., without user, password or query"
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{name}: found what is no address; accepted: {accepted}")  # it may be a key, so not shown
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(f"{name}: found an address of {parts.hostname} that may hold a secret; accepted: {accepted}")
    return address.rstrip("/")


def _key(name: str, key: str) -> str:
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name}: found white space or characters that no header takes; accepted: printable ASCII")
    return key


def _number(name: str, text: str, default: float, *, whole: bool) -> float:
    if not text:
        return default
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if not (1 if whole else 0) <= number < math.inf:
        accepted = "a whole number of at least 1" if whole else "a number of at least 0"
        raise UserError(f"{name}: found {text[:40]!r}; accepted: {accepted}")
    return number


def import_openai() -> ModuleType:
    """The package openai, silent about single requests; UserError if it is not installed."""
    try:
        import openai
    except ImportError as error:
        raise UserError("judges: found no package openai; accepted: pip install 'tempact[judges]'") from error
    for name in ("openai", "httpx", "httpx2"):  # one line a request at INFO
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    return openai
