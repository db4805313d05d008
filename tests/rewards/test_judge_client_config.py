"""Endpoints from the environment: who may use which key, and what is refused in one line."""

from __future__ import annotations

import pytest

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.rewards.judges.config import ROLES, EndpointConfig, JudgeConfig

BASE = {"TEMPACT_JUDGE_BASE_URL": "http://a:8000/v1", "TEMPACT_JUDGE_MODEL": "m", "TEMPACT_JUDGE_API_KEY": "sk-shared"}


def read(environment: dict[str, str], role: str = "temporal_following") -> tuple[EndpointConfig, ...]:
    return JudgeConfig.from_environment({role: ROLES[role]}, environment=environment).roles[role]


def test_one_server_for_all_roles() -> None:
    config = JudgeConfig.from_environment(environment=BASE)
    assert set(config.roles) == {"plan_quality", "temporal_following", "step_following"}
    assert set(config.roles.values()) == {(EndpointConfig("http://a:8000/v1", "m", "sk-shared"),)}


def test_a_role_of_its_own_does_not_take_the_shared_key() -> None:
    own = {"TEMPACT_JUDGE_PLAN_QUALITY_BASE_URL": "https://b/v1"}
    assert read(BASE | own, "plan_quality") == (EndpointConfig("https://b/v1", "m", ""),)
    own["TEMPACT_JUDGE_PLAN_QUALITY_API_KEY"] = "sk-own"
    own["TEMPACT_JUDGE_PLAN_QUALITY_MODEL"] = "n"
    assert read(BASE | own, "plan_quality") == (EndpointConfig("https://b/v1", "n", "sk-own"),)
    assert read(BASE | own) == (EndpointConfig("http://a:8000/v1", "m", "sk-shared"),)


def test_a_model_of_its_own_on_the_shared_server() -> None:
    assert read(BASE | {"TEMPACT_JUDGE_TEMPORAL_FOLLOWING_MODEL": "n"})[0].model == "n"


def test_the_names_of_the_reference_implementation() -> None:
    old = {"VLLM_BASE_URL": "http://v/v1", "VLLM_MODEL": "vl", "LLM_BASE_URL": "http://l/v1", "LLM_MODEL": "l",
           "LLM_API_KEY": "k", "VLLM_API_KEY": "vk"}  # fmt: skip
    assert read(old, "plan_quality") == (EndpointConfig("http://l/v1", "l", "k"),)
    assert read(old, "step_following") == (EndpointConfig("http://v/v1", "vl", "vk"),)
    assert read(old | BASE)[0].base_url == "http://a:8000/v1"


def test_several_servers() -> None:
    several = BASE | {
        "TEMPACT_JUDGE_BASE_URL": "http://a:8000/v1/, http://b:8000/v1",
        "TEMPACT_JUDGE_CONCURRENCY": "4,8",
        "TEMPACT_JUDGE_REQUESTS_PER_MINUTE": "90.5",
    }
    assert read(several) == (
        EndpointConfig("http://a:8000/v1", "m", "sk-shared", 4, 90.5),
        EndpointConfig("http://b:8000/v1", "m", "sk-shared", 8, 90.5),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TEMPACT_JUDGE_BASE_URL": ""}, "TEMPACT_JUDGE_TEMPORAL_FOLLOWING_BASE_URL, TEMPACT_JUDGE_BASE_URL, VLLM_BAS"),
        ({"TEMPACT_JUDGE_BASE_URL": "a:8000"}, "TEMPACT_JUDGE_BASE_URL: found what is no address"),
        ({"TEMPACT_JUDGE_BASE_URL": "sk-secret"}, "no address"),
        ({"TEMPACT_JUDGE_BASE_URL": "http://a:port/v1"}, "no address"),
        ({"TEMPACT_JUDGE_BASE_URL": "http://user:sk-secret@a/v1"}, "address of a that may hold a secret"),
        ({"TEMPACT_JUDGE_BASE_URL": "http://a/v1?key=sk-secret"}, "address of a that may hold a secret"),
        ({"TEMPACT_JUDGE_MODEL": ""}, "TEMPACT_JUDGE_MODEL: found nothing"),
        ({"TEMPACT_JUDGE_MODEL": "m,n"}, "one name, served by every endpoint"),
        ({"TEMPACT_JUDGE_API_KEY": "sk-secret\nx"}, "TEMPACT_JUDGE_API_KEY: found white space"),
        ({"TEMPACT_JUDGE_API_KEY": "sk-secret,b"}, "TEMPACT_JUDGE_API_KEY: found 2 values; accepted: one, or 1"),
        ({"TEMPACT_JUDGE_CONCURRENCY": "0"}, "TEMPACT_JUDGE_CONCURRENCY: found '0'"),
        ({"TEMPACT_JUDGE_CONCURRENCY": "1.5"}, "a whole number of at least 1"),
        ({"TEMPACT_JUDGE_REQUESTS_PER_MINUTE": "-1"}, "a number of at least 0"),
        ({"TEMPACT_JUDGE_REQUESTS_PER_MINUTE": "nan"}, "a number of at least 0"),
    ],
)
def test_refused_in_one_line_without_secrets(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        read(BASE | changed)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "sk-secret" not in str(error.value) and "sk-shared" not in str(error.value)


def test_limits_are_those_of_the_configuration() -> None:
    found = JudgeConfig.from_environment({"held_out": ""}, JudgeSettings(deadline_s=7.0, attempts=2, cache=""), BASE)
    assert (found.deadline_s, found.attempts, found.attempt_s, found.cache) == (7.0, 2, 60.0, None)
    assert list(found.roles) == ["held_out"]


def test_nothing_shows_a_key() -> None:
    config = JudgeConfig.from_environment(environment=BASE)
    assert "sk-shared" not in repr(config) and "sk-shared" not in str(config.roles)
    assert config.redact("key sk-shared, twice sk-shared") == "key ***, twice ***"
