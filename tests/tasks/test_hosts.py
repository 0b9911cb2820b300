"""Which servers a worker's lists allow: origins are compared whole, and an odd URL is none."""

from __future__ import annotations

import pytest

from tasks.errors import SettingsError
from tasks.hosts import Origin, entries_of, may_be_asked, may_have_key, origin_of
from tasks.settings import load_settings


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Judge.Example/v1", Origin("https", "judge.example", 443)),
        ("http://judge:8000/v1", Origin("http", "judge", 8000)),
        ("http://me:secret@judge/v1", Origin("http", "judge", 80)),
        ("http://[::1]:8000/v1", Origin("http", "::1", 8000)),
        ("http://good.example@evil.example/v1", Origin("http", "evil.example", 80)),
        ("http://evil:1\\@good.example/v1", None),
        ("http://evil\t@good.example/v1", None),
        ("http://good.example\u3002evil/v1", None),
        ("ftp://judge/v1", None),
        ("file:///etc/passwd", None),
        ("http://judge:99999/v1", None),
        ("judge/v1", None),
        ("", None),
    ],
)
def test_a_url_leads_to_one_origin_or_is_odd(url, origin):
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    ("entry", "url", "is_allowed"),
    [
        ("judge.example", "https://judge.example/v1", True),
        ("judge.example", "https://judge.example:443/v1", True),
        ("judge.example", "https://judge.example:8443/v1", False),
        ("judge.example", "http://judge.example/v1", False),
        ("judge.example:8443", "https://judge.example:8443/v1", True),
        ("judge.example:8443", "http://judge.example:8443/v1", False),
        ("judge.example:8443", "https://judge.example/v1", False),
        ("http://judge:8000", "http://judge:8000/v1", True),
        ("http://judge:8000", "http://judge:8001/v1", False),
        ("http://judge:8000", "https://judge:8000/v1", False),
        ("http://judge", "http://judge/v1", True),
        ("https://judge", "https://judge/v1", True),
        ("judge.example", "https://evil-judge.example/v1", False),
        ("judge.example", "https://judge.example.evil.example/v1", False),
        ("127.0.0.1", "http://127.0.0.1:8000/v1", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000/v1", False),
        ("[::1]:8000", "http://[::1]:8000/v1", True),
    ],
)
def test_a_key_goes_to_the_port_and_scheme_that_are_written(entry, url, is_allowed):
    assert may_have_key(origin_of(url), entries_of(entry)) is is_allowed


@pytest.mark.parametrize(
    ("entry", "url", "is_allowed"),
    [
        ("judge", "http://judge:8000/v1", True),
        ("judge", "https://judge/v1", True),
        ("judge:8000", "http://judge:8000/v1", True),
        ("judge:8000", "http://judge:6379/v1", False),
        ("https://judge", "http://judge/v1", False),
        ("judge", "http://169.254.169.254/latest", False),
        ("a, judge ,b", "http://judge/v1", True),
    ],
)
def test_an_entry_without_a_port_lets_a_host_be_asked_at_any(entry, url, is_allowed):
    assert may_be_asked(origin_of(url), entries_of(entry)) is is_allowed
    assert load_settings(judge_hosts=entry).may_ask(url) is is_allowed


def test_without_a_list_every_server_may_be_asked_and_none_may_have_a_key():
    settings = load_settings()
    assert settings.may_ask("http://anything:1/v1")
    assert not settings.may_send_key(origin_of("https://anything/v1"))


@pytest.mark.parametrize("variable", ["hosts", "judge_hosts"])
@pytest.mark.parametrize(
    "entry", ["http://judge/v1", "judge:port", "ftp://judge", "a b", "me@judge", "*", "judge:99999"]
)
def test_what_is_no_host_is_refused_with_its_variable(variable, entry):
    with pytest.raises(SettingsError, match=f"REWARDQ_{variable.upper()}: .*is no host; write host, host:8000"):
        load_settings(**{variable: f"good.example, {entry}"})
