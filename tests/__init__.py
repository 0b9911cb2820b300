"""Tests; a package, so that workers can import `tests.reward_models`."""
