"""Secrets are masked in whatever people read."""

from __future__ import annotations

import pytest

from tasks.masking import SECRETS, Secrets, masked

SECRET = "zq-81-of-mine"


@pytest.mark.parametrize(
    "text",
    [
        f"asked redis://:{SECRET}@host:6379/0 in vain",
        f"asked https://me:{SECRET}@judge/v1, then sentinel://:{SECRET}@one:1;sentinel://:{SECRET}@two:1",
        f"look at https://files/a.png?X-Amz-Signature={SECRET}&x=1",
        f"https://files/a?sig={SECRET}",
        f"token={SECRET}",
        f"api_key={SECRET}, next",
        f"(access-token={SECRET})",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'bearer {SECRET}'}}",
    ],
)
def test_a_secret_is_masked_by_its_form_or_its_name(text):
    assert SECRET not in masked(text)
    assert "***" in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "raise max_tokens=512; num_tokens=3",
        "reward=PickScore num_samples=16 queued_s=0.4",
        "asked http://judge:8000/v1 after 2 requests",
        "rediss://host:6379/0?ssl_cert_reqs=none",
        "the bearer of bad news",
        "a key=1 of a mapping",
    ],
)
def test_usual_words_stay(text):
    assert masked(text) == text


def test_a_known_secret_is_masked_by_its_value_however_it_is_written():
    secrets = Secrets()
    secrets.add("p/w@rd-1", "short")
    said = secrets.masked("p/w@rd-1 p%2Fw%40rd-1 p\\/w@rd-1 short")
    assert said == "*** *** *** short"


def test_a_longer_secret_goes_before_one_that_it_begins_with():
    secrets = Secrets()
    secrets.add("secret-one")
    secrets.add("secret-one-and-two")
    assert secrets.masked("secret-one-and-two") == "***"


def test_the_passwords_of_settings_and_the_keys_of_the_environment_are_known(in_env):
    from tasks.settings import load_settings

    in_env(REWARDQ_KEY_OURS="key-of-ours-81", REWARDQ_SENTINEL_PASSWORD="sentinels-81")
    load_settings(broker_url="redis://:broker-81@host:6379/0", payload_url="redis://h/0?password=payload-81")
    said = SECRETS.masked("key-of-ours-81 sentinels-81 broker-81 payload-81")
    assert said == "*** *** *** ***"
