"""Train the demo's codec (magnet_train/codec/spectral.py) on rendered music and its notes.

The first phase fits encoder and codebooks, which decide the codes: the linear reading of pitches
by logistic regression on the notes, the levels by principal components, the codebooks by k-means.
The second trains the decoder alone, so shards made after the first phase stay good. It follows the
clock, not a number of steps, and resumes from its last checkpoint.

    python data/demo/train_codec.py codes --audio AUDIO/train --out RUN --clips 360
    python data/demo/train_codec.py decoder --audio AUDIO/train --out RUN --minutes 45
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from magnet_train.codec.spectral import (
    SpectralCodecConfig,
    SpectralDecoder,
    SpectralEncoder,
    SpectralModel,
    mel_filters,
    nearest,
)
from magnet_train.common.folders import replacing
from magnet_train.metrics.chroma import WINDOW_S

WEIGHTS = {
    "log": 1.0,
    "linear": 1.0,
    "mel": 1.0,
    "slow": 1.5,
    "rise": 1.5,
    "chroma": 10.0,
    "heard": 30.0,
}
"""Of the decoder's losses."""
HEARD = 2
"""Clips of a batch whose waveform is compared too, because reconstructing phases takes long."""

Note = tuple[float, float, int, int, bool]
"""Onset and duration in seconds, MIDI pitch, velocity, whether it belongs to the lead."""


def audio_files(folder: Path, most: int | None = None) -> list[Path]:
    """Return the .flac files that have notes beside them, at most so many, spread over all."""
    files = sorted(p for p in folder.glob("*.flac") if p.with_suffix(".notes.json").exists())
    if not files:
        raise SystemExit(f"error: {folder} holds no .flac files with notes; run render.py first")
    return files if most is None else files[:: max(1, len(files) // most)][:most]


def read(path: Path, config: SpectralCodecConfig) -> Tensor:
    """Read whole frames of a file: `1 n`."""
    wav, rate = soundfile.read(path, dtype="float32")
    if rate != config.sample_rate or wav.ndim != 1:
        raise SystemExit(f"error: {path} is not mono at {config.sample_rate} Hz; run render.py")
    return torch.from_numpy(wav[: len(wav) // config.hop_samples * config.hop_samples])[None]


def notes_with_lead(path: Path) -> list[Note]:
    """Read a file's notes; where no voice is called the lead, the highest sounding note is."""
    notes = json.loads(path.with_suffix(".notes.json").read_text())
    if any(note[4] for note in notes):
        return notes

    def is_highest(onset: float, duration: float, pitch: int) -> bool:
        middle = onset + duration / 2
        return not any(t < middle < t + d and p > pitch for t, d, p, _, _ in notes)

    return [(t, d, p, v, is_highest(t, d, p)) for t, d, p, v, _ in notes]


def piano_roll(notes: list[Note], num_frames: int, config: SpectralCodecConfig) -> Tensor:
    """Return the share of each frame during which each pitch sounds: `t pitches`."""
    frame_s = config.hop_samples / config.sample_rate
    roll = torch.zeros(num_frames, config.num_pitches)
    for onset, duration, pitch, _, _ in notes:
        row = min(max(pitch - config.lowest_pitch, 0), config.num_pitches - 1)
        end = onset + max(duration, 0.05)
        frames = range(int(onset / frame_s), min(num_frames, int(end / frame_s) + 1))
        for frame in frames:
            overlap = min(frame_s * (frame + 1), end) - max(frame_s * frame, onset)
            share = max(0.0, overlap / frame_s)
            roll[frame, row] = max(roll[frame, row].item(), share)
    return roll


@dataclass
class Frames:
    """What encoder and codebooks are fitted to, one row per frame."""

    harmonics: Tensor
    """The spectrum that pitches are read from, `n f`."""
    levels: Tensor
    """Band levels, `n (s bands)`."""
    sounding: Tensor
    """The share of the frame during which each pitch sounds: of the lead, of all notes; `n 2p`."""


@torch.no_grad()
def collect(files: list[Path], encoder: SpectralEncoder, rng: np.random.Generator) -> Frames:
    """Read files at levels that vary; a codec that has heard one loudness fails on the others."""
    harmonics, levels, sounding = [], [], []
    for path in tqdm(files, unit="clip"):
        gain = 10 ** (rng.uniform(-4, 2) / 20)
        wav = (read(path, encoder.config) * gain).clamp(-1, 1)
        harmonics.append(encoder.harmonics(wav)[0])
        levels.append(encoder.band_levels(wav)[0])
        notes = notes_with_lead(path)
        count = len(harmonics[-1])
        lead = piano_roll([n for n in notes if n[4]], count, encoder.config)
        sounding.append(torch.cat([lead, piano_roll(notes, count, encoder.config)], dim=1))
    return Frames(torch.cat(harmonics), torch.cat(levels), torch.cat(sounding))


def fit_pitches(layer: nn.Linear, frames: Frames, steps: int = 4000, lr: float = 4e-3) -> float:
    """Fit the reading of pitches by logistic regression; return the last loss."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        batch = torch.randint(len(frames.harmonics), (512,))
        logits = layer(frames.harmonics[batch])
        loss = F.binary_cross_entropy_with_logits(logits, frames.sounding[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def fit_levels(layer: nn.Linear, levels: Tensor) -> None:
    """Set the layer to the first principal components, scaled to a total variance of about 1."""
    mean, covariance = levels.mean(0), torch.cov(levels.T)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : layer.out_features]
    scale = covariance.trace().sqrt()
    layer.weight.copy_(components.T / scale)
    layer.bias.copy_(-mean @ components / scale)


def k_means(x: Tensor, size: int, iterations: int = 18, least_share: float = 2e-4) -> Tensor:
    """Return entries `c d` for the rows of x; entries that few rows use begin anew at some row."""
    entries = x[torch.randperm(len(x))[:size]].clone()
    for step in range(iterations):
        index = nearest(x, entries)
        uses = torch.bincount(index, minlength=size)
        sums = torch.zeros_like(entries).index_add_(0, index, x)
        entries = sums / uses.clamp(min=1)[:, None]
        unused = uses < len(x) * least_share
        if step < iterations - 3:
            entries[unused] = x[torch.randint(len(x), (int(unused.sum()),))]
    return entries


@torch.no_grad()
def fit_codebooks(latents: Tensor, config: SpectralCodecConfig) -> Tensor:
    """Fit codebooks `k c d` to latents `n d`, residual after residual.

    Those of pitches cluster pitches, and hold the mean levels of their cluster; the others cluster
    the residual levels.
    """
    residual = latents.clone()
    pitches = slice(0, 2 * config.num_pitches)
    levels = slice(pitches.stop, config.latent_dim)
    codebooks = torch.zeros(config.num_codebooks, config.codebook_size, config.latent_dim)
    for number, k in enumerate(config.quantising_order):
        part = pitches if number < config.pitch_codebooks else levels
        index = nearest(residual[:, part], k_means(residual[:, part], config.codebook_size))
        uses = torch.bincount(index, minlength=config.codebook_size).clamp(min=1)
        entries = torch.zeros(config.codebook_size, config.latent_dim)
        entries.index_add_(0, index, residual)
        entries /= uses[:, None]
        if part is levels:
            entries[:, pitches] = 0
        residual -= entries[nearest(residual, entries)]
        codebooks[k] = entries
        left = [residual[:, p].var(0).sum() / latents[:, p].var(0).sum() for p in (pitches, levels)]
        print(f"codebook {k + 1}: left of pitches {left[0]:.3f}, of levels {left[1]:.3f}")
    return codebooks


def train_codes(
    files: list[Path], config: SpectralCodecConfig, seed: int = 0, pitch_steps: int = 4000
) -> SpectralModel:
    """First phase: a model whose encoder and codebooks are fitted, and whose decoder is random."""
    model = SpectralModel(config)
    encoder = model.encoder
    frames = collect(files, encoder, np.random.default_rng(seed))
    print(f"pitches: cross-entropy {fit_pitches(encoder.pitch, frames, pitch_steps):.4f}")
    fit_levels(encoder.level, frames.levels)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(weight.half())  # as they are stored, so that codebooks fit what is loaded
        pitches = encoder.pitch(frames.harmonics).sigmoid() * config.pitch_scale
        latents = torch.cat([pitches, encoder.level(frames.levels)], dim=1)
        model.entries.copy_(fit_codebooks(latents, config))
    return model


class Crops:
    """Random crops of .flac files, a few of each file that is read."""

    def __init__(self, files: list[Path], crop_s: float, config: SpectralCodecConfig, seed: int):
        self.files, self.config = files, config
        self.frames = round(crop_s * config.sample_rate / config.hop_samples)
        self.rng = np.random.default_rng(seed)
        self.pool: list[Tensor] = []

    def batch(self, size: int) -> Tensor:
        """`b n`"""
        while len(self.pool) < size + 100:
            self._read_files()
        return torch.stack([self.pool.pop() for _ in range(size)]).clamp(-1, 1)

    def _read_files(self) -> None:
        length = self.frames * self.config.hop_samples
        for _ in range(12):
            wav = read(self.files[self.rng.integers(len(self.files))], self.config)[0]
            for start in self.rng.integers(max(1, len(wav) - length + 1), size=10):
                crop = wav[start : start + length]
                if len(crop) == length and crop.abs().max() > 1e-3:
                    self.pool.append(crop * 10 ** (self.rng.uniform(-6, 2) / 20))
        order = self.rng.permutation(len(self.pool))
        self.pool = [self.pool[i] for i in order]


@torch.no_grad()
def start_linear(model: SpectralModel, files: list[Path]) -> None:
    """Set the decoder's linear map by least squares, and its correction to zero."""
    decoder = model.decoder
    width = model.config.latent_dim + 1
    outputs = decoder.linear.out_features
    squares, products = torch.eye(width), torch.zeros(width, outputs)
    for path in tqdm(files, unit="clip"):
        wav = read(path, model.config)
        latents = model.latents(model.quantise(model.encoder(wav[:, None]))) * decoder.input_scale
        x = F.pad(latents[0].T, (0, 1), value=1.0)
        wanted = log_magnitude(decoder, wav)[0].T.reshape(len(x), outputs)
        squares += x.T @ x
        products += x.T @ wanted
    solution = torch.linalg.solve(squares, products)
    decoder.linear.weight.copy_(solution[:-1].T)
    decoder.linear.bias.copy_(solution[-1])
    decoder.last.weight.zero_()
    decoder.last.bias.zero_()


def log_magnitude(decoder: SpectralDecoder, wav: Tensor) -> Tensor:
    """What the decoder is to give for a waveform: `b n` -> `b f m`."""
    return (decoder.spectrum.transform(wav).abs() + decoder.floor).log()


@torch.no_grad()
def latents_of(model: SpectralModel, wav: Tensor, rng: np.random.Generator) -> Tensor:
    """Latents of a batch's codes; one clip in four has only its first 2 to K - 1 codebooks."""
    codes = model.quantise(model.encoder(wav[:, None]))
    count = len(model.entries)
    depths = np.where(rng.random(len(wav)) < 0.25, rng.integers(2, count, len(wav)), count)
    rows = [model.latents(row[None, :depth]) for row, depth in zip(codes, depths, strict=True)]
    return torch.cat(rows)


def losses(given: Tensor, wanted: Tensor, mel: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Compare log magnitudes `b f m`: bin by bin, by the levels of bands and their rises, and by
    chroma.

    Bin by bin alone, the best guess at noise is its median, which is too soft; bands keep its
    power, and bands averaged over 80 and 320 ms keep it best. Rises and falls from one sub-frame
    to the next make attacks sharp and held notes steady. The chroma loss keeps the energy of a note
    in its pitch class.

    Args:
        given: log magnitudes of the decoder.
        wanted: those of the music.
        mel: filters `bands f`.
        classes: pitch class of each bin, `12 f`.
    """
    given_linear, wanted_linear = given.exp(), wanted.exp()
    given_power, wanted_power = mel @ given_linear.square(), mel @ wanted_linear.square()
    given_level, wanted_level = level(given_power), level(wanted_power)
    difference = (given_linear - wanted_linear).abs().sum((1, 2))
    given_chroma, wanted_chroma = classes @ given_linear, classes @ wanted_linear
    loudness = wanted_chroma.norm(dim=1)
    cosine = F.cosine_similarity(given_chroma, wanted_chroma, dim=1, eps=1e-4)
    slow = [
        F.l1_loss(level(F.avg_pool1d(given_power, n)), level(F.avg_pool1d(wanted_power, n)))
        for n in (8, 32)
    ]
    return {
        "log": F.l1_loss(given, wanted),
        "linear": (difference / wanted_linear.sum((1, 2)).clamp(min=1)).mean(),
        "mel": F.l1_loss(given_level, wanted_level),
        "slow": torch.stack(slow).mean(),
        "rise": F.l1_loss(given_level.diff(dim=2), wanted_level.diff(dim=2)),
        "chroma": ((1 - cosine) * loudness).sum() / loudness.sum().clamp(min=1e-3),
    }


def with_own_phases(decoder: SpectralDecoder, given: Tensor) -> Tensor:
    """Waveforms `b n` of log magnitudes `b f m`, differentiable but for their phases.

    These must be the reconstructed ones. With those of the music, which are in tune already, the
    decoder learns magnitudes that are less so.
    """
    with torch.no_grad():
        phases = decoder.spectrum.transform(decoder.waveform(given)).angle()
    return decoder.spectrum.invert(torch.polar(decoder.magnitude(given), phases))


def chroma_difference(given: Tensor, wanted: Tensor) -> Tensor:
    """1 - mean cosine of chroma `b t 12`; unlike in `losses`, soft frames count as loud ones."""
    sounds = wanted.norm(dim=2) > 1e-3
    return 1 - F.cosine_similarity(given, wanted, dim=2)[sounds].mean()


def heard_chroma(wav: Tensor, classes: Tensor) -> Tensor:
    """Chroma of waveforms `b n` in the windows of `metrics/chroma.py`, not normalised: `b t 12`."""
    size = 2 * (classes.shape[1] - 1)
    window = torch.hann_window(size)
    spectrum = torch.stft(wav, size, size // 4, window=window, center=False, return_complex=True)
    return (classes @ spectrum.abs()).transpose(1, 2)


def pitch_classes(sample_rate: int, window_samples: int) -> Tensor:
    """`12 f`: 1 where a bin between 65 Hz and 2.1 kHz belongs to a pitch class, C first."""
    freqs = torch.arange(window_samples // 2 + 1) * (sample_rate / window_samples)
    nearest = (12 * torch.log2(freqs.clamp(min=1) / 440)).round().long() + 9
    audible = (freqs > 65) & (freqs < 2100)
    return (F.one_hot(nearest % 12, 12) * audible[:, None]).T.float()


def level(power: Tensor) -> Tensor:
    """Half the logarithm of a power."""
    return torch.log(power + 1e-7) / 2


def train_decoder(
    audio: Path, out: Path, minutes: float, batch: int, crop_s: float, lr: float, seed: int
) -> None:
    """Second phase: the decoder, for so many minutes of wall clock."""
    model = SpectralModel.load(out / "codec")
    decoder, config = model.decoder, model.config
    mel = mel_filters(config.sample_rate, config.window_samples, 96)
    classes = pitch_classes(config.sample_rate, config.window_samples)
    heard_classes = pitch_classes(config.sample_rate, round(WINDOW_S * config.sample_rate))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    state = {"step": 0, "elapsed_s": 0.0}
    files, checkpoint = audio_files(audio), out / "decoder.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    else:
        start_linear(model, files[:: max(1, len(files) // 90)][:90])
    crops = Crops(files, crop_s, config, seed + int(state["step"]))
    start = time.monotonic() - state["elapsed_s"]
    last_save, recent = time.monotonic(), []

    def save() -> None:
        with replacing(checkpoint) as temporary:
            parts = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**parts, "state": state}, temporary)
        model.save(out / "codec")

    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        warm_up = min(1.0, (state["step"] + 1) / 100)
        optimizer.param_groups[0]["lr"] = (
            lr * warm_up * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        )
        wav = crops.batch(batch)
        latents = latents_of(model, wav, crops.rng)
        with torch.autocast("cpu", torch.bfloat16):
            given = decoder.log_magnitude(latents)
        given = given.float()
        parts = losses(given, log_magnitude(decoder, wav), mel, classes)
        sound = with_own_phases(decoder, given[:HEARD])
        parts["heard"] = chroma_difference(
            heard_chroma(sound, heard_classes), heard_chroma(wav[:HEARD], heard_classes)
        )
        loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        recent.append({name: value.item() for name, value in parts.items()})
        state = {"step": state["step"] + 1, "elapsed_s": time.monotonic() - start}
        if time.monotonic() - last_save > 60:
            means = {name: round(float(np.mean([r[name] for r in recent])), 4) for name in WEIGHTS}
            print(json.dumps(state | means), flush=True)
            save()
            last_save, recent = time.monotonic(), []
    save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=("codes", "decoder"), help="What to train.")
    parser.add_argument("--audio", type=Path, required=True, help="Folder that render.py wrote.")
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder; the codec is in OUT/codec."
    )
    parser.add_argument("--clips", type=int, default=360, help="Files that codes are fitted to.")
    parser.add_argument("--minutes", type=float, default=45, help="Decoder's training, wall clock.")
    parser.add_argument("--batch", type=int, default=8, help="Crops per step of the decoder.")
    parser.add_argument("--crop_s", type=float, default=2.0, help="Length of a crop, in seconds.")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="Decoder's highest learning rate.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, clusters and crops.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # decaying notes are full of them, and they are slow
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.phase == "codes":
        if (args.out / "codec").exists():
            raise SystemExit(f"error: {args.out / 'codec'} exists; choose another --out")
        files = audio_files(args.audio, args.clips)
        train_codes(files, SpectralCodecConfig(), args.seed).save(args.out / "codec")
    else:
        train_decoder(
            args.audio, args.out, args.minutes, args.batch, args.crop_s, args.lr, args.seed
        )


if __name__ == "__main__":
    main()
