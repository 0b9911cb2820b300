"""The outcomes in a Redis with both faces: a test plays the worker and the client."""

from __future__ import annotations

from tasks.outcomes import ClientOutcomes, WorkerOutcomes


class Outcomes(WorkerOutcomes, ClientOutcomes):
    """What a worker and what a client may do with outcomes."""
