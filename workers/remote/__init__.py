"""Reward models that run behind a server of the user's, and how a worker reaches one."""
