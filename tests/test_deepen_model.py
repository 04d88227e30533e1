"""data/demo/deepen_model.py: a deeper network with the same logits."""

import sys
from pathlib import Path

import torch

from magnet_train.model import Magnet, MagnetConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "data/demo"))  # the script is in no package
from deepen_model import deepened


def test_a_deeper_model_has_the_same_logits_and_its_new_blocks_learn():
    config = MagnetConfig(
        dim=16,
        num_heads=2,
        num_layers=4,
        num_codebooks=2,
        codebook_size=8,
        text_dim=4,
        convolution=3,
    )
    torch.manual_seed(0)
    network = Magnet(config)
    weights, deeper_config = deepened(network.state_dict(), config, every=2)
    assert deeper_config.num_layers == 6
    deeper = Magnet(deeper_config)
    deeper.load_state_dict(weights)
    codes = torch.randint(0, 9, (2, 2, 12))
    text = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    for stage in map(config.stage, range(2)):
        expected = network(codes, stage, network.encode_text(*text))
        found = deeper(codes, stage, deeper.encode_text(*text))
        assert torch.equal(expected, found)
    found.sum().backward()
    for index in (2, 5):
        block = deeper.blocks[index]
        for projection in (block.self_attention.out, block.cross_attention.out, block.ffn_out):
            assert projection.weight.grad.abs().max() > 0
        assert block.convolution.weight.grad.abs().max() > 0
