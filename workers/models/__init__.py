"""Reward models that run in the worker, one family a file."""
