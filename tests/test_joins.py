"""Joined audio: the recording is unchanged outside the regions; loops are continuous."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_train.decoding.joins import (
    Join,
    crossfade,
    decode_loop,
    encode_blocks,
    join_loop,
    linear_render,
    resample_loop,
    runs,
)

HOP = 8


class Smooth:
    """A codec of one codebook, whose decoder averages over one neighbour."""

    facts = SimpleNamespace(hop_samples=HOP, frame_rate=4.0, sample_rate=32, channels=1)

    def encode(self, wav):
        padded = torch.nn.functional.pad(wav, (0, -wav.shape[2] % HOP))
        return padded.unflatten(2, (-1, HOP)).mean(3).round().long()

    def decode(self, codes, known=None):
        held = codes.float().repeat_interleave(HOP, 2)
        return torch.nn.functional.avg_pool1d(
            torch.nn.functional.pad(held, (HOP, HOP), mode="replicate"), 2 * HOP + 1, stride=1
        )


def test_a_crossfade_leaves_equal_signals_and_keeps_the_power_of_unrelated_ones():
    same, other = torch.randn(1, 4000), torch.randn(1, 4000)
    assert torch.allclose(crossfade(same, same), same, atol=1e-5)
    power = crossfade(same, other).square().view(8, -1).mean(1)
    assert (power - 1).abs().max() < 0.3  # 0.5 in the middle of a linear fade


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(1, 9), st.booleans())
def test_outside_the_regions_the_samples_are_those_of_the_recording(mask, block, longer):
    to_decode = torch.tensor(mask + [True] * 4 * longer)
    torch.manual_seed(0)
    original = torch.randn(2, len(mask) * HOP)
    codes = torch.randint(0, 9, (1, len(to_decode)))
    join = Join(original, to_decode, len(to_decode) * HOP, HOP, fade=3, block=block)
    out = torch.cat(list(join.blocks(linear_render(Smooth(), codes, 32))), 1)
    assert out.shape == (2, len(to_decode) * HOP) and out.isfinite().all()
    stays = (~to_decode[: len(mask)]).repeat_interleave(HOP)
    assert torch.equal(out[:, : len(mask) * HOP][:, stays], original[:, stays])
    whole = Smooth().decode(codes[None])[0]
    for first, last in runs(to_decode):  # without the fades, all blocks equal a single decoding
        inner = slice(first * HOP + 3, last * HOP - 3)
        assert torch.allclose(out[:, inner], whole.expand(2, -1)[:, inner], atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 3, 50])
def test_a_loop_is_decoded_without_a_seam(num_frames):
    codes = torch.randint(0, 9, (1, num_frames))
    loop = decode_loop(Smooth(), codes, fade_s=0.1)
    turned = decode_loop(Smooth(), codes.roll(1, 1), fade_s=0.1)
    assert loop.shape == (1, num_frames * HOP)
    assert torch.allclose(turned, loop.roll(HOP, 1), atol=1e-5)
    again = encode_blocks(Smooth(), codes[..., None].expand(1, -1, HOP).flatten(1).float(), True)
    assert torch.equal(again[0], codes)


def test_regions_of_a_loop_may_reach_over_its_end():
    to_decode = torch.zeros(10, dtype=torch.bool)
    to_decode[:2] = to_decode[8:] = True
    original, loop = torch.randn(1, 85), torch.randn(1, 85)
    out = join_loop(Join(original, to_decode, 85, 8.5, 3, 10, is_loop=True), loop)
    assert out.shape == original.shape
    assert torch.equal(out[:, 17:68], original[:, 17:68])
    inside = torch.tensor([*range(71, 85), *range(14)])
    assert torch.equal(out[:, inside], loop[:, inside])


class Listening(Smooth):
    """A codec that keeps the audio that it is given beside a block."""

    def decode(self, codes, known=None):
        self.known = known[0, 0]
        return super().decode(codes)


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_the_codec_knows_the_recording_beside_a_region_and_nothing_of_the_region(mask):
    to_decode = torch.tensor(mask)
    codec, codes = Listening(), torch.zeros(1, len(mask), dtype=torch.long)
    samples = torch.arange(1.0, len(mask) * HOP + 1)  # each sample is its own place
    render = linear_render(codec, codes, 32)

    def checked(first, last, before, after):
        wav = render(first, last, before, after)
        start = max(0, first - 4)  # a second of context
        place = samples[start * HOP :][: len(codec.known)]
        is_known = ~codec.known.isnan()
        assert torch.equal(codec.known[is_known], place[is_known])
        frames = is_known.unflatten(0, (-1, HOP))
        assert torch.equal(frames.any(1), frames.all(1))
        assert not frames[first - start : last - start].any()
        assert first == 0 or frames[first - start - 1].all()
        assert last == len(mask) or frames[last - start].all()
        return wav

    join = Join(samples[None], to_decode, len(samples), HOP, fade=3, block=len(mask))
    list(join.blocks(checked))


def test_a_period_of_another_length_stays_a_period():
    phase = torch.arange(200) / 200 * 2 * torch.pi
    loop = resample_loop(torch.sin(3 * phase)[None], 187)
    expected = torch.sin(3 * torch.arange(187) / 187 * 2 * torch.pi)
    assert torch.allclose(loop[0], expected, atol=1e-5)


def test_long_audio_is_encoded_in_blocks_as_in_one_piece():
    wav = torch.randint(0, 9, (1, 100 * HOP - 3)).float()
    assert torch.equal(encode_blocks(Smooth(), wav), Smooth().encode(wav[None]))
