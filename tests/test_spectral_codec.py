"""The spectral codec: content of its codes, and limits of its decoder's output."""

import json
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from magnet_train.codec.base import load_codec
from magnet_train.codec.spectral import (
    SpectralCodec,
    SpectralCodecConfig,
    SpectralModel,
    Spectrum,
    high_pass,
    soft_limit,
)
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.decoding.joins import decode_loop

RATE, HOP = 16_000, 640
SMALL = SpectralCodecConfig(
    num_codebooks=3, codebook_size=32, level_dim=12, dim=16, layers=1, griffin_lim_steps=4
)


def chord(*pitches: int, seconds: float = 2.0) -> Tensor:
    """`b c n`; each pitch (a MIDI number) with four decreasing harmonics."""
    t = torch.arange(round(seconds * RATE)) / RATE
    wav = torch.zeros(len(t))
    for pitch in pitches:
        hz = 440 * 2 ** ((pitch - 69) / 12)
        for harmonic in range(1, 5):
            wav += 0.08 * 0.5**harmonic * torch.sin(2 * torch.pi * hz * harmonic * t)
    return wav[None, None]


@pytest.fixture(scope="module")
def train_codec():
    """Functions of data/demo/train_codec.py."""
    return SimpleNamespace(**run_path(str(demo_path("train_codec.py"))))


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Clips of a melody with a bass, a new chord each half second, and their notes."""
    folder, rng = tmp_path_factory.mktemp("music"), np.random.default_rng(0)
    for clip in range(12):
        waves, notes = [], []
        for i in range(8):
            lead, bass = int(rng.integers(60, 80)), int(rng.integers(40, 52))
            waves.append(chord(lead, bass, seconds=0.5)[0, 0])
            notes += [(i / 2, 0.5, lead, 90, True), (i / 2, 0.5, bass, 60, False)]
        soundfile.write(folder / f"{clip:02d}.flac", torch.cat(waves).numpy(), RATE)
        (folder / f"{clip:02d}.notes.json").write_text(json.dumps(notes))
    return sorted(folder.glob("*.flac"))


@pytest.fixture(scope="module")
def model(train_codec, music: list[Path]) -> SpectralModel:
    torch.manual_seed(0)
    return train_codec.train_codes(music, SMALL, pitch_steps=600).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def codec(model: SpectralModel, tmp_path_factory: pytest.TempPathFactory) -> SpectralCodec:
    folder = tmp_path_factory.mktemp("codec")
    model.save(folder)
    loaded = load_codec(str(folder))
    assert isinstance(loaded, SpectralCodec)
    return loaded


def test_a_chord_survives_without_its_phases(model: SpectralModel):
    wav = chord(57, 61, 64)[0]
    decoder = SpectralModel(SpectralCodecConfig(dim=16, layers=1)).decoder
    wanted = decoder.spectrum.transform(wav).abs()
    made = decoder.waveform((wanted + decoder.floor).log())
    assert made.shape == wav.shape
    given = decoder.spectrum.transform(made).abs()
    inner = slice(10, -10)  # both ends lack half a window
    error = (given - wanted)[..., inner].norm() / wanted[..., inner].norm()
    assert error < 0.06


def test_phases_continue_those_of_known_audio():
    codec = load_codec()
    codes = codec.encode(chord(60, 64, 67, seconds=4.0))
    wav = codec.decode(codes)
    gap = slice(40 * HOP, 60 * HOP)
    # The same sound with other phases, as a recording has them.
    turned = torch.fft.irfft(torch.fft.rfft(wav) * torch.exp(torch.tensor(2j)), wav.shape[2])
    known = turned.clone()
    known[..., gap] = torch.nan
    beside = codec.decode(codes, known)
    for border in (slice(gap.start, gap.start + 320), slice(gap.stop - 320, gap.stop)):
        expected = turned[0, 0, border]

        def likeness(x: Tensor, border: slice = border, expected: Tensor = expected) -> float:
            return float(torch.cosine_similarity(x[0, 0, border], expected, dim=0))

        assert likeness(beside) > 0.9 > 0 > likeness(wav)
    nothing = torch.full_like(wav, torch.nan)
    assert torch.equal(codec.decode(codes, nothing), wav)
    with pytest.raises(ValueError, match="known must be"):
        codec.decode(codes, known[..., 1:])


def test_a_region_over_the_end_of_a_loop_is_decoded_as_anywhere_else():
    codec = load_codec()
    recorded = codec.decode(codec.encode(chord(60, 64, 67, seconds=4.0)))[0]
    codes = codec.encode(recorded[None])[0]
    region = slice(20 * HOP, 80 * HOP)
    recorded[:, region] = torch.nan
    middle = decode_loop(codec, codes, 0.02, recorded)
    # The same loop, begun in the middle of the region.
    turned = decode_loop(codec, codes.roll(-50, 1), 0.02, recorded.roll(-50 * HOP, 1))
    likeness = torch.cosine_similarity(turned.roll(50 * HOP, 1)[0, region], middle[0, region], 0)
    assert likeness > 0.99


def test_inverting_a_transform_gives_the_wave():
    spectrum = Spectrum(1024, 160)
    wav = torch.randn(2, 4800, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(spectrum.invert(spectrum.transform(wav)), wav, atol=1e-4)


def test_facts(codec: SpectralCodec):
    facts = codec.facts
    assert (facts.sample_rate, facts.frame_rate, facts.hop_samples) == (RATE, 25.0, HOP)
    assert (facts.num_codebooks, facts.codebook_size, facts.channels) == (3, 32, 1)
    assert codec.codebooks.shape == (3, 32, SMALL.latent_dim)


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 7 * HOP + 1])
def test_a_begun_frame_counts(codec: SpectralCodec, samples: int):
    codes = codec.encode(0.1 * torch.randn(1, 1, samples))
    assert codes.shape == (1, 3, -(-samples // HOP))
    assert codec.decode(codes).shape == (1, 1, codes.shape[2] * HOP)


def test_a_frame_has_its_code_from_its_own_window(codec: SpectralCodec):
    wav = torch.cat([chord(60, 45), chord(60, 45)], dim=2)
    changed = torch.cat([chord(60, 45), chord(71, 50)], dim=2)
    same = (codec.encode(wav) == codec.encode(changed)).all(1)[0]
    reach = -(-(2048 - HOP) // 2 // HOP)  # frames to each side of which a window hears a part
    assert same[: 50 - reach].all() and not same[50 + reach :].any()


def test_a_held_chord_repeats_its_codes(codec: SpectralCodec):
    codes = codec.encode(chord(64, 45, seconds=4.0))[0, :, 2:-2]
    assert (codes[:2, 1:] == codes[:2, :-1]).all()


def test_levels_come_first_and_pitches_do_not_depend_on_loudness(codec: SpectralCodec):
    rng = np.random.default_rng(1)
    wav = torch.cat([chord(int(p), 45, seconds=0.52) for p in rng.integers(60, 80, 16)], dim=2)
    same = (codec.encode(wav) == codec.encode(wav / 2)).double().mean((0, 2))
    assert same[0] < 0.5 and same[1] > 0.97 and same[2] > 0.9


@pytest.mark.parametrize(
    ("num_codebooks", "order"), [(1, [0]), (2, [1, 0]), (3, [1, 2, 0]), (5, [1, 2, 0, 3, 4])]
)
def test_pitches_are_quantised_before_levels(num_codebooks: int, order: list[int]):
    assert SpectralCodecConfig(num_codebooks=num_codebooks).quantising_order == order


def test_pitches_are_read_from_the_spectrum(model: SpectralModel):
    probabilities = (
        model.encoder(chord(67, 43))[0, : 2 * SMALL.num_pitches] / (SMALL.pitch_scale[:, None])
    )
    lead, notes = probabilities[:, 5:-5].mean(1).split(SMALL.num_pitches)
    assert lead.argmax() + SMALL.lowest_pitch == 67
    assert set((notes.topk(2).indices + SMALL.lowest_pitch).tolist()) == {67, 43}


def test_a_batch_gives_what_each_gives_alone(codec: SpectralCodec):
    wav = torch.cat([chord(60, 45), chord(66, 41), chord(72)])
    together = codec.encode(wav)
    assert torch.equal(together, torch.cat([codec.encode(w[None]) for w in wav]))
    # Clips of a frame, of a part of one, and with ends that share a batch.
    clips = [wav[0, :, :n] for n in (1, 100, 640, 641, 700, 1300, 3001, 3840, 9999, 10_000, 12_345)]
    keys = {codec.batch_key(clip.shape[1]) for clip in clips}
    for clip, codes in zip(clips, codec.encode_clips(clips), strict=True):
        assert torch.equal(codes, codec.encode(clip[None])[0])
    assert len(keys) < len(clips)
    alone = torch.cat([codec.decode(c[None]) for c in together])
    # Phase reconstruction amplifies rounding differences of batched matrix products.
    assert (codec.decode(together) - alone).norm() < 0.01 * alone.norm()


def test_file_and_model_give_the_same_codes(codec: SpectralCodec, model: SpectralModel):
    wav = torch.cat([chord(60, 45), chord(66, 41)])
    assert (codec.encode(wav) == model.quantise(model.encoder(wav))).double().mean() > 0.99


def test_hash_is_of_what_decides_the_codes(model: SpectralModel, tmp_path: Path):
    def saved(change: str) -> str:
        changed = SpectralModel(SMALL)
        changed.load_state_dict(model.state_dict())
        with torch.no_grad():
            if change:
                changed.state_dict()[change].flatten()[0] += 1
        changed.save(tmp_path / (change or "same"))
        return load_codec(str(tmp_path / (change or "same"))).facts.hash

    same = saved("")
    assert saved("decoder.last.bias") == same
    assert saved("encoder.pitch.bias") != same
    assert saved("encoder.level.weight") != same
    assert saved("entries") != same


def test_the_first_codebooks_are_a_codec_of_their_own(model: SpectralModel, tmp_path: Path):
    model.save(tmp_path)
    all_three, two = load_codec(str(tmp_path)), load_codec(f"{tmp_path}@2")
    wav = chord(60, 45)
    codes = two.encode(wav)
    assert two.facts.num_codebooks == 2 and two.facts.hash != all_three.facts.hash
    assert torch.equal(codes, all_three.encode(wav)[:, :2])
    assert torch.equal(two.decode(codes), all_three.decode(codes))


def test_no_codes_give_dc_or_clip(model: SpectralModel):
    """With an extreme decoder that predicts full scale in every bin, including 0 Hz."""
    wild = SpectralModel(SMALL)
    wild.load_state_dict(model.state_dict())
    with torch.no_grad():
        wild.decoder.linear.bias.fill_(3.0)
    generator = torch.Generator().manual_seed(0)
    for decoder in (model, wild):
        codes = torch.randint(32, (4, 3, 100), generator=generator)
        wav = decoder.decoder(decoder.latents(codes))
        assert wav.mean(1).abs().max() < 1e-5
        assert wav.abs().max() < 1
    assert wav.square().mean().sqrt() > 0.1  # the wild one is loud, and not silenced


def test_high_pass_takes_dc_and_leaves_the_lowest_note():
    t = torch.arange(RATE) / RATE
    low_e = 0.1 * torch.sin(2 * torch.pi * 41 * t)[None]
    assert torch.allclose(high_pass(low_e + 0.5, RATE), low_e, atol=1e-3)
    assert high_pass(torch.full((1, 700), 0.7), RATE).abs().max() < 1e-5


def test_soft_limit_leaves_what_is_within_its_knee():
    wav = torch.linspace(-3, 3, 601)[None]
    limited = soft_limit(wav)
    inside = wav.abs() <= 0.8
    assert torch.equal(limited[inside], wav[inside])
    assert limited.abs().max() < 0.9501 and (limited.diff() >= 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 4096), ("layers", 10**9), ("codebook_size", 1 << 16), ("num_bands", "x"), ("dim", -1)],
)
def test_sizes_that_the_weights_have_not_are_refused(name, value, model, tmp_path: Path):
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=r"codec|model\.safetensors") as caught:
        load_codec(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_codec_of_zeros_is_refused(tmp_path: Path):
    SpectralModel(SMALL).save(tmp_path)
    with pytest.raises(UserError, match="codebook 0 is all zero"):
        load_codec(str(tmp_path))


@torch.no_grad()
def test_the_decoder_starts_from_a_map_that_works(train_codec, model, music: list[Path]):
    started = SpectralModel(SMALL)
    started.load_state_dict(model.state_dict())
    train_codec.start_linear(started, music[:8])
    wav = train_codec.read(music[9], SMALL)
    wanted = train_codec.log_magnitude(started.decoder, wav)
    latents = started.latents(started.quantise(started.encoder(wav[:, None])))
    error = (started.decoder.log_magnitude(latents) - wanted).square().mean()
    spread = (wanted - wanted.mean(2, keepdim=True)).square().mean()
    assert error < 0.6 * spread


def test_the_decoder_learns_and_goes_on_where_it_stopped(
    train_codec, model, music: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model.save(tmp_path / "codec")
    before = load_codec(str(tmp_path / "codec"))
    arguments = dict(audio=music[0].parent, out=tmp_path, batch=4, crop_s=0.8, lr=1e-3, seed=0)
    train_codec.train_decoder(minutes=0.03, **arguments)
    first = torch.load(tmp_path / "decoder.pt", weights_only=True)["state"]
    train_codec.train_decoder(minutes=0.05, **arguments)
    second = torch.load(tmp_path / "decoder.pt", weights_only=True)["state"]
    assert 0 < first["step"] < second["step"]
    after = load_codec(str(tmp_path / "codec"))
    assert after.facts.hash == before.facts.hash
    assert isinstance(before, SpectralCodec) and isinstance(after, SpectralCodec)
    wav = train_codec.read(music[3], SMALL)
    wanted = train_codec.log_magnitude(after.model.decoder, wav)

    def error(codec: SpectralCodec) -> float:
        latents = codec.model.latents(codec.encode(wav[None]))
        return (codec.model.decoder.log_magnitude(latents) - wanted).abs().mean().item()

    assert error(after) < 0.5 * error(before)
