"""Attention context of frames, and sharing between stages."""

import torch

from magnet_train.model import Magnet, MagnetConfig, sinusoidal_positions

TINY = MagnetConfig(dim=32, num_heads=2, num_layers=3, codebook_size=16, text_dim=8, context=2)


def frames_seen(model: Magnet, stage: int, frame: int, num_frames: int = 40) -> list[int]:
    """Frames whose embedding changes the logits of `frame`, from gradients."""
    codes = torch.randint(16, (1, 4, num_frames))
    seen: list[torch.Tensor] = []

    def keep(module, args):
        seen.append(args[0])
        args[0].retain_grad()

    handle = model.blocks[0].register_forward_pre_hook(keep)
    model(codes, TINY.stage(stage), None)[0, frame].sum().backward()
    handle.remove()
    return seen[0].grad[0].abs().sum(1).nonzero()[:, 0].tolist()


def test_stage_0_sees_everything_and_later_stages_their_window():
    model = Magnet(TINY)
    assert frames_seen(model, 0, 20) == list(range(40))
    reach = TINY.context * TINY.num_layers  # a window per layer
    for stage in (1, 2, 3):
        assert frames_seen(model, stage, 20) == list(range(20 - reach, 20 + reach + 1))


def test_a_stage_cannot_see_codebooks_above_it_through_the_mask_id():
    model = Magnet(TINY).eval()
    codes = torch.randint(16, (2, 4, 30))
    hidden = codes.clone()
    hidden[:, 2:] = TINY.mask_id
    other = codes.clone()
    other[:, 2:] = TINY.mask_id
    other[:, 3] = TINY.mask_id
    assert torch.equal(model(hidden, TINY.stage(1), None), model(other, TINY.stage(1), None))


def test_idle_heads_get_zero_gradients_not_none():
    model = Magnet(TINY)
    text = model.encode_text(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    model(torch.randint(16, (1, 4, 20)), TINY.stage(1), text).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model.head.grad[[0, 2, 3]] == 0).all() and (model.head.grad[1] != 0).any()


def test_padding_and_neighbours_change_nothing():
    model = Magnet(TINY).eval()
    codes, text = torch.randint(16, (2, 4, 30)), torch.randn(2, 6, 8)
    tokens = torch.arange(6)[None] < torch.tensor([[6], [2]])
    valid = torch.arange(30)[None] < torch.tensor([[30], [17]])
    codes[1, :, 17:] = TINY.mask_id
    for stage in range(4):
        both = model(codes, TINY.stage(stage), model.encode_text(text, tokens), valid)
        alone = model(
            codes[1:, :, :17], TINY.stage(stage), model.encode_text(text[1:, :2], tokens[1:, :2])
        )
        assert torch.allclose(both[1:, :17], alone, atol=1e-5)


def test_no_text_equals_the_null_condition():
    model = Magnet(TINY).eval()
    codes = torch.randint(16, (2, 4, 30))
    null = model.encode_text(torch.zeros(2, 1, 8), torch.zeros(2, 1, dtype=torch.bool))
    assert torch.equal(model(codes, TINY.stage(2), None), model(codes, TINY.stage(2), null))


def test_positions_stay_apart_in_low_precision():
    far = sinusoidal_positions(1500, 64)
    assert far.dtype == torch.float32 and (far[1400] - far[1401]).abs().max() > 1e-2
    assert torch.allclose(far[7, 0], torch.tensor(7.0).cos())
    assert torch.allclose(far[7, 32], torch.tensor(7.0).sin())


def test_neighbouring_codec_entries_start_with_similar_embeddings():
    model = Magnet(
        MagnetConfig(
            dim=16, num_heads=2, num_layers=1, num_codebooks=2, codebook_size=32, text_dim=4
        )
    )
    mask = model.embedding[:, -1].clone()
    codebooks = torch.randn(2, 32, 8)
    model.start_from_codebooks(codebooks, torch.Generator().manual_seed(0))
    for k in range(2):
        for weight in (model.embedding[k, :-1], model.head[k]):
            ratio = torch.pdist(weight) / torch.pdist(codebooks[k])
            assert torch.allclose(ratio, ratio[0], rtol=1e-4)
    assert torch.equal(model.embedding[:, -1], mask)
    assert torch.allclose(model.head.square().mean((1, 2)), torch.tensor(1 / 16), rtol=1e-4)
