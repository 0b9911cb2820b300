"""Fuzzers: each has a `run(seconds)` that a command can call, and a short form in the suite."""
