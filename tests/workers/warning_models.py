"""A reward class whose constructor prints, and whose libraries warn of something."""

from __future__ import annotations

import logging
import warnings

from workers import PointwiseRewardModel, RewardModelOutput


class Warned(PointwiseRewardModel):
    required_fields = ()

    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        print("Loading weights: 100%")
        warnings.warn("Some weights were newly initialized: ['head.weight']", UserWarning, stacklevel=1)
        logging.getLogger("transformers.modeling_utils").warning("the moon is full")

    def __call__(self, prompt, **kwargs):
        return RewardModelOutput([1.0] * len(prompt))
