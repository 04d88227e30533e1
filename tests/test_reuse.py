"""Reuse between steps: exact without cached frames, and where they are outside the context."""

import torch

from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.model import Magnet, MagnetConfig

T, SIZE = 60, 32


def model(context: int = 3, num_layers: int = 2) -> Magnet:
    torch.manual_seed(0)
    config = MagnetConfig(
        dim=32, num_heads=2, num_layers=num_layers, codebook_size=SIZE, text_dim=16, context=context
    )
    return Magnet(config)


def asked(stage: int) -> torch.Tensor:
    codes = torch.randint(SIZE, (2, 4, T), generator=torch.Generator().manual_seed(stage))
    codes[:, stage] = SIZE
    codes[:, stage + 1 :] = SIZE
    return codes


def test_the_first_pass_of_every_stage_is_exact():
    network = model()
    text = network.encode_text(
        torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True, True, False, False, False]])
    )
    for memory in (text, None):
        passes = CachedForward(network, memory)
        for stage in range(4):
            assert torch.allclose(
                passes(asked(stage), stage),
                network(asked(stage), network.config.stage(stage), memory),
                atol=1e-5,
            )


def test_frames_whose_surroundings_did_not_change_stay_exact():
    """Two layers of context 3 see 6 frames, so frames further from a change equal a full pass."""
    network = model()
    passes, codes = CachedForward(network, None), asked(1)
    passes(codes, 1)
    after = codes.clone()
    after[:, 1, :30] = 7
    exact, reused = network(after, network.config.stage(1), None), passes(after, 1)
    assert torch.allclose(reused[:, 36:], exact[:, 36:], atol=1e-5)
    assert not torch.allclose(reused[:, :30], torch.zeros(1))


def test_without_context_nothing_is_lost():
    """With a context of 0 a frame depends only on its codes, so reuse is exact; also with one
    layer.
    """
    network = model(context=0)
    passes, codes = CachedForward(network, None), asked(2)
    for step in range(4):
        codes = codes.clone()
        codes[:, 2, step * 10 : step * 10 + 10] = step
        assert torch.allclose(
            passes(codes, 2), network(codes, network.config.stage(2), None), atol=1e-5
        )


def test_with_all_frames_visible_old_keys_are_used_and_only_there_it_differs():
    network = model(num_layers=1)
    passes, codes = CachedForward(network, None), asked(0)
    passes(codes, 0)
    after = codes.clone()
    after[:, 0, :20] = 3
    # One layer: keys depend only on codes, so recomputed frames use no cached values.
    assert torch.allclose(
        passes(after, 0), network(after, network.config.stage(0), None), atol=1e-5
    )


def test_the_option_changes_codes_but_leaves_no_mask(tiny):
    decoding = DecodingConfig(decoding_steps=(4, 3, 3, 3, 3))
    exact = tiny.generate(["a waltz", "two flutes"], decoding=decoding)
    reused = tiny.generate(
        ["a waltz", "two flutes"],
        decoding=DecodingConfig(decoding_steps=(4, 3, 3, 3, 3), cache_frames=True),
    )
    assert reused.codes.shape == exact.codes.shape
    assert reused.codes.max() < tiny.network.config.codebook_size
    first = exact.order == 0  # decided by the exact first pass of stage 0
    assert torch.equal(reused.codes[:, 0][first[:, 0]], exact.codes[:, 0][first[:, 0]])
