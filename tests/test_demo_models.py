"""The demo's scripts that change weights: deeper networks, and means of checkpoints."""

import sys
from pathlib import Path

import torch

from magnet_train.generator import load
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.release import SavedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "data/demo"))  # the script is in no package
from deepen_model import deepened
from release_model import average_weights


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


def test_the_weights_of_several_models_are_averaged(tmp_path):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        generator = load("demo")
        generator.network = Magnet(generator.network.config)
        generator.save(tmp_path / str(seed))
        models.append(SavedModel.open(tmp_path / str(seed)))
    average_weights(generator.network, models)
    first, second = (model.weights()["head"] for model in models)
    assert torch.allclose(generator.network.head, (first + second) / 2, atol=1e-7)
    assert not torch.allclose(first, second, atol=1e-3)
