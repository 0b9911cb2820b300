"""Flow-Factory's GRPO with rewardq's reward buffer: no reward model is loaded in the trainer's processes.

The config is a Flow-Factory config with its `rewards:` and `eval_rewards:` blocks unchanged.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from flow_factory.advantage import AdvantageProcessor
from flow_factory.hparams import Arguments
from flow_factory.samples import BaseSample
from flow_factory.trainers import load_trainer
from flow_factory.trainers.grpo import GRPOTrainer
from flow_factory.trainers.registry import register_trainer

from trainer_client import RewardClient
from trainer_client.adapters.flow_factory import RewardBuffer, aggregation

CONFIG = sys.argv[1] if len(sys.argv) > 1 else ""


@register_trainer("grpo")
class QueuedGRPOTrainer(GRPOTrainer):
    """Their trainer, with rewards from rewardq's workers."""

    def _init_reward_model(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self.client = RewardClient.from_yaml(
            CONFIG,
            run=str(self.log_args.run_name),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            launch=os.environ.get(
                "REWARDS_LAUNCH"
            ),  # the same on all ranks of one start
        )
        self.reward_models, self.eval_reward_models = {}, {}
        self.reward_buffer = RewardBuffer(
            self.client, self.training_args.group_size, on_failure="nan"
        )
        self.eval_reward_buffer = RewardBuffer(
            self.client, 1, split="eval", on_failure="nan"
        )
        self.advantage_processor = AdvantageProcessor(
            accelerator=self.accelerator,
            reward_weights={
                spec.name: spec.weight for spec in self.client.config.rewards
            },
            group_size=self.training_args.group_size,
            global_std=self.client.config.global_std,
            sampler_type=self.config.data_args.sampler_type,
        )
        self.training_args.advantage_aggregation = aggregation(
            self.client.config.advantage_aggregation
        )
        return self.reward_models, self.eval_reward_models

    def prepare_feedback(self, samples: list[BaseSample]) -> None:
        super().prepare_feedback(samples)
        self.log_data(
            {**self.reward_buffer.metrics(), "train_samples": samples[:30]},
            step=self.step,
        )

    def evaluate(self) -> None:
        super().evaluate()
        self.log_data(
            self.eval_reward_buffer.metrics(), step=self.step
        )  # the means of their own metrics turn NaN by a single NaN


def main() -> None:
    trainer = load_trainer(Arguments.load_from_yaml(CONFIG))
    try:
        trainer.start()
    finally:
        trainer.client.close()


if __name__ == "__main__":
    main()
