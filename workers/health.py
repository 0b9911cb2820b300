"""Whether a worker of this host lives, for a container's health check: `python -m workers.health`, status 0 or 1."""

from __future__ import annotations

import platform
import sys

import redis

from tasks.celery_app import app, client_outcomes


def main() -> int:
    """Print which workers of this host have a heartbeat in Redis.

    Returns 1 if none has, if all are stuck, or if Redis is away; else 0.
    """
    try:
        found = [w for w in client_outcomes(app).workers() if w.host == platform.node()]
    except (redis.RedisError, OSError) as error:
        sys.stderr.write(f"Redis is away: {error}\n")
        return 1
    for worker in found:
        sys.stdout.write(
            f"{worker.node} {worker.state}, queues {', '.join(worker.queues)}\n"
        )
        if worker.stuck:
            sys.stdout.write(f"  takes no messages: {worker.stuck}\n")
        for why in worker.unanswered:
            sys.stdout.write(f"  not yet: {why}\n")
    if not found:
        sys.stderr.write(f"no worker of {platform.node()} has a heartbeat\n")
    return 0 if any(not worker.stuck for worker in found) else 1


if __name__ == "__main__":
    sys.exit(main())
