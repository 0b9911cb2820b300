"""Hostile input by chance: each module here makes some kind of it for a while, and counts what came of it.

A fuzzer is a module with a function `run(seconds: float) -> Counts`. `make fuzz` runs all of them.
What was found once lives in `corpus/<module>/`; the module's `replay(files)` tries it again in `make test`.
"""
