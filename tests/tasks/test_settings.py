from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tasks.errors import SettingsError
from tasks.masking import without_password
from tasks.settings import Settings, load_settings
from tests.servers import clean_env

SECRET = "s3cr3t-pa55"


def test_variables_are_read_and_arguments_override_them(in_env):
    in_env(REWARDQ_BROKER_URL="redis://broker:6380/3", REWARDQ_CLAIM_TTL_S="7.5")
    assert load_settings().broker == "redis://broker:6380/3"
    assert load_settings().claim_ttl_s == 7.5
    assert load_settings(claim_ttl_s=4).claim_ttl_s == 4.0


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("REWARDQ_BROKER", "REWARDQ_BROKER_URL"),
        ("REWARDQ_CLAIM_TTL", "REWARDQ_CLAIM_TTL_S"),
        ("REWARDQ_MAX_STORE_BYTE", "REWARDQ_MAX_STORE_BYTES"),
        ("REWARDQ_PAYLOADURL", "REWARDQ_PAYLOAD_URL"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_is_named(in_env, variable, meant):
    in_env(**{variable: "1"})
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert f"unknown variable {variable} (did you mean '{meant}'?)" in str(caught.value)


def test_an_unknown_argument_is_refused():
    with pytest.raises(SettingsError, match="BORKER_URL"):
        load_settings(borker_url="redis://localhost")


def test_judges_keys_and_other_peoples_variables_are_no_settings(in_env):
    in_env(REWARDQ_KEY_MINE=SECRET, REWARDS="x", rewardq_other="x")
    assert SECRET not in repr(load_settings())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REWARDQ_CLAIM_TTL_S", "soon"),
        ("REWARDQ_CLAIM_TTL_S", "0.5"),
        ("REWARDQ_CLAIM_TTL_S", "inf"),
        ("REWARDQ_RESULT_TTL_S", "-1"),
        ("REWARDQ_RESULT_TTL_S", "0"),
        ("REWARDQ_RESULT_TTL_S", "inf"),
        ("REWARDQ_PAYLOAD_TTL_S", "nan"),
        ("REWARDQ_RECONCILE_S", ""),
        ("REWARDQ_MAX_STORE_BYTES", "8GB"),
        ("REWARDQ_SENDER_THREADS", "0"),
        ("REWARDQ_POOL", "prefork"),
        ("REWARDQ_BROKER_URL", "localhost:6379"),
        ("REWARDQ_BROKER_URL", "http://localhost:6379"),
        ("REWARDQ_BROKER_URL", "file:///tmp/broker"),
        ("REWARDQ_RESULT_URL", "file:///tmp/results"),
        ("REWARDQ_BROKER_URL", ""),
        ("REWARDQ_PAYLOAD_URL", "/dev/shm/rewardq"),
        ("REWARDQ_PAYLOAD_URL", "file://dev/shm/rewardq"),
        ("REWARDQ_BROKER_URL", "redis://localhost:port/0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_variable(in_env, variable, value):
    in_env(**{variable: value})
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{variable}: ")
    assert value in str(caught.value)


def test_all_wrong_values_are_named_at_once(in_env):
    in_env(REWARDQ_POOL="gevent", REWARDQ_MAX_PIXELS="many")
    with pytest.raises(SettingsError, match=r"POOL.*MAX_PIXELS|MAX_PIXELS.*POOL"):
        load_settings()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://:***@host:6379/0"),
        (f"redis://user:{SECRET}@host:6379/0", "redis://user:***@host:6379/0"),
        (f"rediss://user:{SECRET}@host/0?ssl_cert_reqs=none", "rediss://user:***@host/0?ssl_cert_reqs=none"),
        (f"redis://user:a@{SECRET}@host/0", "redis://user:***@host/0"),
        (f"redis://user:a;{SECRET}@host/0", "redis://user:***@host/0"),
        (f"redis://user:a/{SECRET}@host/0", "redis://user:***@host/0"),
        (f"redis://host/0?password={SECRET}&db=1", "redis://host/0?password=***&db=1"),
        (f"sentinel://:{SECRET}@one:26379;sentinel://:{SECRET}@two:26379", "sentinel://:***@one:26379;sentinel://:***@two:26379"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:@host:6379/0", "redis://:@host:6379/0"),
        ("redis://user:@host:6379/0", "redis://user:@host:6379/0"),
        (f"https://{SECRET}@host/v1", "https://***@host/v1"),
        (f"https://host/v1?sig={SECRET}&a=1", "https://host/v1?sig=***&a=1"),
        (f"https://host/v1?x=1&X-Amz-Signature={SECRET}", "https://host/v1?x=1&X-Amz-Signature=***"),
        ("file:///dev/shm/rewardq", "file:///dev/shm/rewardq"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize("service", ["REWARDQ", "REWARDQ_REDIS", "REWARDQ_PAYLOAD", "REWARDQ_BROKER_URL"])
@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("SERVICE_HOST", "10.0.0.7"),
        ("SERVICE_PORT", "6379"),
        ("SERVICE_PORT_HTTP_METRICS", "9121"),
        ("PORT", "tcp://10.0.0.7:6379"),
        ("PORT", "udp://10.0.0.7:53"),
        ("PORT_6379_TCP", "tcp://10.0.0.7:6379"),
        ("NAME", "/worker/rewardq-redis"),
        ("ENV_REDIS_VERSION", "7.0.15"),
        ("PORT_6379_TCP_ADDR", "10.0.0.7"),
        ("PORT_6379_TCP_PORT", "6379"),
        ("PORT_53_UDP_PROTO", "udp"),
        ("PORT_9_SCTP", "sctp://10.0.0.7:9"),
    ],
)
def test_what_kubernetes_says_of_a_service_is_nobodys_typo(in_env, service, suffix, value):
    in_env(**{f"{service}_{suffix}": value})
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REWARDQ_REDIS_PORT", "6379"),
        ("REWARDQ_PORT", "6379"),
        ("REWARDQ_SERVICE_HOSTS", "10.0.0.7"),
        ("REWARDQ_REDIS_HOST", "10.0.0.7"),
        ("REWARDQ_PORT_TCP", "tcp://10.0.0.7:6379"),
    ],
)
def test_what_only_looks_like_a_service_is_still_refused(in_env, variable, value):
    in_env(**{variable: value})
    with pytest.raises(SettingsError, match=f"unknown variable {variable}"):
        load_settings()


@pytest.mark.parametrize("scheme", ["http", "redsi"])
def test_an_error_about_a_url_does_not_show_its_password(in_env, scheme):
    in_env(REWARDQ_BROKER_URL=f"{scheme}://user:{SECRET}@host:6379/0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert SECRET not in str(caught.value)
    assert "user:***@host" in str(caught.value)


def test_payloads_go_to_the_next_database_of_the_brokers_server_unless_told():
    assert load_settings(broker_url="redis://h:1/0").payloads == "redis://h:1/1"
    assert load_settings(broker_url="redis://h:1").payloads == "redis://h:1/1"
    assert load_settings(broker_url="rediss://u:p@h:1/4?ssl_cert_reqs=none").payloads == (
        "rediss://u:p@h:1/5?ssl_cert_reqs=none"
    )
    assert load_settings(broker_url="redis://h:1/0", payload_url="redis://other:2/0").payloads == "redis://other:2/0"
    assert load_settings(payload_url="file:///dev/shm/x").payloads == "file:///dev/shm/x"


def test_results_go_to_the_broker_unless_told():
    assert load_settings(broker_url="redis://h:1/0").results == "redis://h:1/0"
    assert load_settings(broker_url="redis://h:1/0", result_url="redis://r:2/0").results == "redis://r:2/0"


def test_lists_are_comma_separated_and_forgive_spaces():
    settings = load_settings(modules=" my_rewards, other.rewards ,", hosts="Judge.Example, b")
    assert settings.allowed_modules == ("my_rewards", "other.rewards")
    assert settings.allowed_hosts == ("judge.example", "b")


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().broker_url = "redis://elsewhere"


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"],
        ["-m", "celery", "-A", "tasks", "flower"],
        [f"{sys.executable.rpartition('/')[0]}/rewardq", "demo"],
    ],
)
def test_a_command_with_a_wrong_variable_says_so_in_a_line(command):
    env = {**clean_env(), "REWARDQ_BROKR_URL": "redis://localhost"}
    ended = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == os.EX_CONFIG
    assert "unknown variable REWARDQ_BROKR_URL (did you mean 'REWARDQ_BROKER_URL'?)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_media_of_a_killed_trainer_take_room_for_a_quarter_of_an_hour_and_no_longer():
    assert load_settings().payload_ttl_s == 900


@pytest.mark.parametrize("token", ["two words", "caf\xe9", "a\nb"])
def test_a_token_that_no_header_can_have_is_refused_and_not_shown(in_env, token):
    in_env(REWARDQ_SERVER_TOKEN=token)
    with pytest.raises(SettingsError, match="REWARDQ_SERVER_TOKEN: needs letters, digits") as caught:
        load_settings()
    assert token not in str(caught.value)


def test_a_token_is_stripped_and_not_shown():
    settings = load_settings(server_token=" t0ken ")
    assert settings.server_token.get_secret_value() == "t0ken"
    assert "t0ken" not in repr(settings)
