"""What runs in containers is pinned, and no pin is older than the releases that closed known ways in."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.deploy.conftest import DOCKER, composed
from tests.servers import ROOT

REDIS = {
    "6.2": "6.2.24",
    "7.2": "7.2.16",
    "7.4": "7.4.11",
    "8.2": "8.2.9",
    "8.4": "8.4.6",
    "8.6": "8.6.6",
    "8.8": "8.8.2",
}
"""By branch the first release of Redis without CVE-2026-81934 (foreign code by TLS), CVE-2026-23479 (by blocking
commands), CVE-2025-49844 and CVE-2025-46817 (by Lua scripts), CVE-2025-32023 (by HyperLogLog)."""

NEWER_REDIS = "8.10.1"
"""The first such release of all later branches."""

VLLM = "0.31.0"
"""The first release of vLLM without CVE-2026-114053 (a request names the revision of code that is imported),
CVE-2026-27893 and CVE-2026-22807 (code of a model is run though it was not trusted)."""

PYTHON = "3.12.14"
"""The patch release of Python that was current when the images were last looked over."""

PACKAGES = {
    "h11": "0.16.0",  # CVE-2025-43859: requests smuggled through chunked bodies
    "pillow": "11.3.0",  # CVE-2025-48379: a write out of bounds in DDS
    "tornado": "6.5.0",  # CVE-2025-47287: a log line for each malformed part of a form
    "torch": "2.6.0",  # CVE-2025-32434: torch.load runs code in spite of weights_only
    "transformers": "4.53.0",  # CVE-2025-5197 and others: regular expressions that never end
    "urllib3": "2.6.0",  # CVE-2025-66418, CVE-2025-66471: answers that grow without bound when decompressed
}
"""Packages of the locks, and the first release without what is named."""


def is_closed(image: str) -> bool:
    """Whether the pinned release of a server is at least as new as the list wants it."""
    name, _, tag = image.partition("@")[0].rpartition(":")
    version = Version(re.match(r"v?(\d+\.\d+\.\d+)", tag)[1])
    if name == "vllm/vllm-openai":
        return version >= Version(VLLM)
    if name == "python":
        return version >= Version(PYTHON)
    assert name == "redis"
    oldest = REDIS.get(f"{version.major}.{version.minor}", NEWER_REDIS)
    return version >= Version(oldest)


def images() -> set[str]:
    """The images that others have made: compose's, and those that ours are built on."""
    services = composed()["services"].values()
    bases = re.findall(r"^FROM (\S+:\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    return {*bases, *(service["image"] for service in services if "build" not in service)}


def test_every_image_is_of_an_exact_release_without_known_ways_in():
    assert {re.split("[:@]", image)[0] for image in images()} == {"redis", "python", "vllm/vllm-openai"}
    for image in images():
        assert is_closed(image), image


@pytest.mark.parametrize(
    "image",
    [
        "redis:7.4.1-bookworm",
        "redis:7.4.10-bookworm@sha256:00",
        "redis:8.8.1",
        "redis:8.0.9",
        "redis:7.0.15",
        "vllm/vllm-openai:v0.11.2",
        "vllm/vllm-openai:v0.30.0@sha256:00",
        "python:3.12.8-slim-bookworm",
    ],
)
def test_an_older_pin_is_found(image):
    assert not is_closed(image)


def test_every_image_is_pinned_by_digest():
    for image in images():
        assert re.search(r"@sha256:[0-9a-f]{64}$", image), image


def test_the_docs_name_the_releases_that_run():
    page = (DOCKER / "README.md").read_text()
    for image in images():
        version = re.search(r":v?(\d+\.\d+\.\d+)", image)[1]
        assert version in page, image


def locked(role: str) -> list[tuple[Requirement, list[str]]]:
    """What a lock names, each with its hashes."""
    text = (DOCKER / "locks" / f"{role}.txt").read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        name, *hashes = line.split("--hash=")
        found.append((Requirement(name.strip()), [one.strip() for one in hashes]))
    return found


EXTRAS = {"gpu": ("gpu", "ocr"), "vlm": ("judge", "remote"), "flower": ("dashboard",)}


@pytest.mark.parametrize("role", EXTRAS)
def test_a_lock_has_exact_versions_with_hashes_and_names_no_server(role):
    text = (DOCKER / "locks" / f"{role}.txt").read_text()
    assert "://" not in text
    assert "index" not in text
    for requirement, hashes in locked(role):
        assert [one.operator for one in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), requirement


@pytest.mark.parametrize("role", EXTRAS)
def test_a_lock_holds_what_the_package_and_its_extras_need(role):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS[role] for line in project["optional-dependencies"][extra]]
    versions: dict[str, list[Version]] = {}
    for requirement, _ in locked(role):
        (pin,) = requirement.specifier
        versions.setdefault(normal(requirement.name), []).append(Version(pin.version))
    for line in (*project["dependencies"], *extras, "setuptools>=77"):
        needed = Requirement(line)
        found = versions[normal(needed.name)]
        assert all(version in needed.specifier for version in found), line


@pytest.mark.parametrize("role", EXTRAS)
def test_no_lock_holds_a_package_of_a_release_with_known_ways_in(role):
    for requirement, _ in locked(role):
        (pin,) = requirement.specifier
        oldest = PACKAGES.get(normal(requirement.name))
        assert oldest is None or Version(pin.version) >= Version(oldest), requirement


def test_the_packages_that_are_looked_after_are_in_the_locks():
    names = {normal(requirement.name) for role in EXTRAS for requirement, _ in locked(role)}
    assert PACKAGES.keys() <= names


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
