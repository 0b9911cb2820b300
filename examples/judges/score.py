"""Score image files by a rewards file: `python score.py vllm_evaluate.yaml "a red cube" cube.png`."""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from tasks.rewards import Split
from trainer_client import RewardClient, Sample


@click.command()
@click.argument("rewards_yaml", type=click.Path(exists=True, path_type=Path))
@click.argument("prompt")
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="The image that was edited.",
)
@click.option(
    "--split", type=click.Choice(["train", "eval"]), default="train", show_default=True
)
@click.option("--timeout-s", default=600.0, show_default=True)
def main(
    rewards_yaml: Path,
    prompt: str,
    images: tuple[Path, ...],
    source: Path | None,
    split: Split,
    timeout_s: float,
) -> None:
    """Print the rewards of IMAGES, which were all generated for PROMPT, and the judge's replies."""
    condition_images = [Image.open(source).convert("RGB")] if source else None
    samples = [
        Sample(
            prompt=prompt,
            image=Image.open(path).convert("RGB"),
            condition_images=condition_images,
            group=0,
        )
        for path in images
    ]
    with RewardClient.from_yaml(rewards_yaml, run="try-a-judge") as client:
        client.submit(samples, group_size=len(samples), split=split)
        batch = client.collect(timeout_s, on_failure="nan", split=split)
    failures = {(f.reward, f.sample): f for f in batch.failures}
    for name, rewards in batch.rewards.items():
        for i, path in enumerate(images):
            failed = failures.get((name, i))
            print(
                f"{path}  {name}  {failed.kind + ': ' + failed.message if failed else f'{rewards[i]:.4f}'}"
            )
            text = (batch.info[name][i].get("judge") or {}).get("text")
            if text:
                print("    " + text.strip().replace("\n", "\n    "))


if __name__ == "__main__":
    main()
