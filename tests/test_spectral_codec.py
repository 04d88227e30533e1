"""The codec that two CPU cores can train: what its magnitudes keep, and how its training begins."""

import importlib.util

import numpy as np
import pytest
import torch

from magnet_train.codec.base import load_codec
from magnet_train.codec.spectral_v1 import SpectralCodecConfig, Spectrum, build
from magnet_train.common.assets import demo_path

SMALL = SpectralCodecConfig(dim=16, decoder_layers=1, latent_dim=8, codebook_size=16)


def chord(*hz: float, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(round(seconds * 16_000)) / 16_000
    return (0.1 * sum(torch.sin(2 * torch.pi * f * t) for f in hz))[None, None]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def train_codec():
    spec = importlib.util.spec_from_file_location("train_codec", demo_path("train_codec.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_chord_survives_without_its_phases():
    spectrum = Spectrum(SpectralCodecConfig())
    wav = chord(220.0, 277.2, 329.6)
    magnitudes = spectrum.log_magnitude(wav)
    made = spectrum.waveform(magnitudes)
    assert made.shape == wav.shape
    wanted, given = magnitudes.exp(), spectrum.log_magnitude(made).exp()
    inner = slice(10, -10)  # both ends lack half a window
    error = (given - wanted)[..., inner].norm() / wanted[..., inner].norm()
    assert error < 0.06


def test_a_frame_has_its_code_from_its_own_window():
    codec = load_codec()
    wav = chord(220.0, 330.0)
    changed = wav.clone()
    changed[..., 16_000:] = chord(500.0, 620.0)[..., 16_000:]
    same = (codec.encode(wav) == codec.encode(changed)).all(1)[0]
    first = (16_000 - 1024) // 320  # frames before this one cannot hear the change
    assert same[:first].all() and not same[50:].any()


def test_a_held_chord_repeats_its_codes():
    codes = load_codec().encode(chord(220.0, 277.2, 329.6))[0, :, 10:-10]
    assert (codes[0, 1:] == codes[0, :-1]).float().mean() > 0.8


@torch.no_grad()
def test_training_starts_from_a_codec_that_works(train_codec, tmp_path):
    rng = np.random.default_rng(0)

    class Chords:
        def batch(self, size: int) -> torch.Tensor:
            return torch.cat([chord(*rng.uniform(100, 2000, 2), seconds=0.2)[0] for _ in range(size)])

    torch.manual_seed(0)
    model = build(SMALL)
    quantizer = train_codec.ResidualQuantizer(SMALL.num_codebooks, SMALL.codebook_size, SMALL.latent_dim)
    train_codec.start_from_components(model, quantizer, Chords(), frames=2000)
    quantizer.eval()
    wav = Chords().batch(8)[:, None]
    wanted = model.encoder.spectrum.log_magnitude(wav)
    quantised, codes, _ = quantizer(model.encoder(wav))
    given = model.decoder.log_magnitude(quantised)
    spread = (wanted - wanted.mean((0, 2), keepdim=True)).square().mean()
    assert (given - wanted).square().mean() < 0.75 * spread

    train_codec.export(model, quantizer, tmp_path)
    codec = load_codec(str(tmp_path))
    assert (codec.encode(wav) == codes).float().mean() > 0.98  # the file holds half precision
