"""GRPO with TRL on rewards of pictures: a language model writes the words of a sign, workers judge the drawn sign.

The model is made here, untrained and tiny, so that nothing is downloaded. Replace it by your own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trainer_client import RewardClient, Sample
from trainer_client.adapters.trl import reward_functions, reward_weights

WORDS = ["OPEN", "CLOSED", "SALE", "FRESH", "BREAD", "COFFEE"]
NUM_GENERATIONS = 4


def signs(
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[Sample]:
    """Draw the text that the model wrote. The reward models see the picture and the text that was asked for."""
    return [
        Sample(prompt=f'a sign that says "{wanted}"', image=drawn(text))
        for text, wanted in zip(completions, columns["wanted"], strict=True)
    ]


def drawn(text: str) -> Image.Image:
    sign = Image.new("RGB", (384, 96), "white")
    ImageDraw.Draw(sign).text(
        (12, 28), text[:24], fill="black", font=ImageFont.load_default(32)
    )
    return sign


def tiny_model() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "write", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    model, tokenizer = tiny_model()
    data = Dataset.from_dict(
        {"prompt": [f"write {word}" for word in WORDS], "wanted": WORDS}
    )
    with RewardClient.from_yaml(
        Path(__file__).with_name("rewards.yaml"), run="trl-signs"
    ) as client:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward_functions(
                client, to_samples=signs, num_generations=NUM_GENERATIONS
            ),
            args=GRPOConfig(
                output_dir="trl-signs",
                reward_weights=reward_weights(client),
                num_generations=NUM_GENERATIONS,
                per_device_train_batch_size=8,
                max_completion_length=3,
                learning_rate=5e-3,
                max_steps=args.steps,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()


if __name__ == "__main__":
    main()
