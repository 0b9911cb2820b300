"""The keys of compose.yaml as the Compose Specification has them: those that ours uses, and no other."""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
DURATION = {"type": "string", "pattern": r"^(\d+(\.\d+)?(us|ms|s|m|h))+$"}
NAME = r"^[a-zA-Z0-9._-]+$"


def mapping(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """A mapping of these keys alone; `x-...` may stand anywhere."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "patternProperties": {"^x-": {}},
        "additionalProperties": False,
    }


def named(value: Any) -> dict[str, Any]:
    """A mapping whose keys are names."""
    return {"type": "object", "patternProperties": {NAME: value}, "additionalProperties": False}


HEALTHCHECK = mapping(
    ("test",),
    test={"type": "array", "prefixItems": [{"enum": ["CMD", "CMD-SHELL", "NONE"]}], "items": {"type": "string"}},
    interval=DURATION,
    timeout=DURATION,
    start_period=DURATION,
    retries={"type": "integer", "minimum": 1},
)

DEVICE = {
    **mapping(
        ("capabilities",),
        driver=TEXT,
        count={"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]},
        device_ids={**TEXTS, "items": {"type": "string", "pattern": "^[^,]+$"}},
        capabilities=TEXTS,
    ),
    "not": {"required": ["count", "device_ids"]},  # one of them says which
}

SIZE = {"type": "string", "pattern": r"^\d+([kmg]b?)$"}

SERVICE = mapping(
    cap_drop={**TEXTS, "items": {"type": "string", "pattern": "^[A-Z_]+$"}},
    logging=mapping(("driver",), driver=TEXT, options=named({"type": "string"})),
    mem_limit=SIZE,
    pids_limit={"type": "integer", "minimum": 1},
    read_only={"type": "boolean"},
    security_opt=TEXTS,
    shm_size=SIZE,
    tmpfs={**TEXTS, "items": {"type": "string", "pattern": r"^/[^:]+(:[a-z0-9=,]+)?$"}},
    user={"type": "string", "pattern": r"^\d+:\d+$"},
    build=mapping(("context",), context=TEXT, dockerfile=TEXT, target=TEXT),
    command=TEXTS,
    depends_on=named(
        mapping(
            ("condition",),
            condition={"enum": ["service_started", "service_healthy", "service_completed_successfully"]},
        )
    ),
    deploy=mapping(
        resources=mapping(reservations=mapping(devices={"type": "array", "items": DEVICE, "minItems": 1})),
    ),
    entrypoint=TEXTS,
    env_file=TEXT,
    environment=named({"type": ["string", "number", "null"]}),  # a bare true or false is refused by compose
    group_add={**TEXTS, "uniqueItems": True},
    healthcheck=HEALTHCHECK,
    image=TEXT,
    ipc={"enum": ["host", "private", "shareable", "none"]},
    ports={
        "type": "array",
        "items": {"type": "string", "pattern": r"^([\d.]+:)?\d+:\d+$"},
        "uniqueItems": True,
    },
    profiles=TEXTS,
    restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
    stop_grace_period=DURATION,
    stop_signal={"type": "string", "pattern": "^SIG[A-Z]+$"},
    volumes={
        "type": "array",
        "items": {"type": "string", "pattern": r"^[^:]+:/[^:]*(:r[ow])?$"},
        "uniqueItems": True,
    },
)

COMPOSE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **mapping(("services",), services=named(SERVICE), volumes=named({"type": ["object", "null"]})),
}
