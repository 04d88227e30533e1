"""Adds blocks to a trained model; the deeper model computes the same logits until it is trained.

    python data/demo/deepen_model.py --checkpoint runs/shipped --every 2 --out deeper
    python -m magnet_train fit --config … --model.network.num_layers 9 --model.init_from deeper

After every second block (with `--every 2`) a copy of it is inserted whose contributions to the
residual stream are zero: output projections of attention and feed-forward, and the convolution.
Its other weights are copied, so that gradients reach all of its weights after one update.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from magnet_train.generator import load
from magnet_train.model import Magnet, MagnetConfig

SILENT = ("self_attention.out.weight", "cross_attention.out.weight", "ffn_out.weight")


def deepened(
    weights: Mapping[str, Tensor], config: MagnetConfig, every: int
) -> tuple[dict[str, Tensor], MagnetConfig]:
    """Weights and configuration of the deeper network.

    Args:
        weights: State dict of a `Magnet`.
        config: Its configuration.
        every: A block is inserted after each group of this many blocks.
    """
    sources = [
        (block, inserted)
        for block in range(config.num_layers)
        for inserted in ((False, True) if (block + 1) % every == 0 else (False,))
    ]
    deeper = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for index, (block, inserted) in enumerate(sources):
        prefix = re.compile(rf"blocks\.{block}\.")
        for name, value in weights.items():
            if not prefix.match(name):
                continue
            own = name.split(".", 2)[2]
            silent = inserted and (own in SILENT or own.startswith("convolution."))
            deeper[f"blocks.{index}.{own}"] = torch.zeros_like(value) if silent else value.clone()
    return deeper, replace(config, num_layers=len(sources))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="Run folder, checkpoint or release.")
    parser.add_argument(
        "--every", type=int, default=2, help="Insert a block after each group of this many blocks."
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder of the deeper release.")
    args = parser.parse_args()
    generator = load(args.checkpoint)
    weights, config = deepened(generator.network.state_dict(), generator.network.config, args.every)
    generator.network = Magnet(config)
    generator.network.load_state_dict(weights)
    generator.save(args.out)
    print(f"{args.out}: {config.num_layers} blocks")


if __name__ == "__main__":
    main()
