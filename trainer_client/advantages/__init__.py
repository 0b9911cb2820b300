"""Rewards in numbers for the trainer: group-relative advantages, and metrics for its logger.

`formulas` has the advantages, `metrics` the numbers, `exchange` what both gather from all ranks.
"""
