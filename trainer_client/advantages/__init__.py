"""Rewards in numbers for the trainer: group-relative advantages, and metrics for its logger.

`formulas` has the advantages and `metrics` the numbers. Over several ranks both gather the samples of all ranks first:
`exchange` sends plain data, `global_batch` makes one batch of it, `group_ids` makes ids comparable between ranks.
"""

from trainer_client.advantages.formulas import advantages_of, gdpo, weighted_sum
from trainer_client.advantages.metrics import failure_rate_by_group, metrics

__all__ = ["advantages_of", "failure_rate_by_group", "gdpo", "metrics", "weighted_sum"]
