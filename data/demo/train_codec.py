"""Trains the demo's codec: the spectral one that ships, or a small EnCodec, which wants a GPU.

transformers' `EncodecModel` can run a codec but not train one: it has no straight-through estimator, no
commitment loss and no codebook update. So its own encoder and decoder are trained here around a quantiser
of ours, whose codebooks are then written into the model. `tests/test_codec.py` checks that both give the
same codes.

A second phase, `--decoder --adversarial`, trains the decoder alone, against a discriminator; the codes stay as they
are, so shards made after the first phase remain good.

The run is measured in minutes, not steps: the learning rate follows the clock, so a busy machine ends with
a finished model all the same. It resumes from its last checkpoint.

    python data/demo/train_codec.py --audio AUDIO/random AUDIO/train --out RUN --minutes 30
    python data/demo/train_codec.py --audio AUDIO/random AUDIO/train --out RUN --minutes 60 --decoder --adversarial
    python data/demo/train_codec.py --audio AUDIO/random AUDIO/train --out ELSEWHERE --architecture encodec
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import EncodecConfig, EncodecModel

from magnet_train.codec.spectral_v1 import (
    SpectralCodecConfig,
    SpectralDecoder,
    SpectralEncoder,
    Spectrum,
    build,
    save_codec,
    standardise,
)
from magnet_train.common.folders import replacing

SAMPLE_RATE = 16_000


def encodec_config() -> EncodecConfig:
    """EnCodec at 16 kHz, 50 Hz, 4 x 1024 entries (2 kbit/s), shaped for two CPU cores.

    EnCodec as published halves the rate first and spends most of its time on wide layers at thousands of
    frames a second. Here the first layer already divides by 8, so the same budget buys wider layers.
    """
    return EncodecConfig(
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        num_filters=32,
        upsampling_ratios=[5, 8, 8],  # of the decoder; the encoder walks them backwards
        hidden_size=128,
        codebook_dim=128,
        codebook_size=1024,
        target_bandwidths=[2.0],
        num_lstm_layers=1,
        num_residual_layers=1,
        norm_type="weight_norm",
        use_causal_conv=False,
        use_conv_shortcut=False,
        pad_mode="reflect",
        normalize=False,
        chunk_length_s=None,
        overlap=None,
    )


class ResidualQuantizer(nn.Module):
    """Residual vector quantiser whose codebooks follow the latents by exponential averages (EnCodec, Sec. 3.2).

    Entries that fall below `min_share` of a fair share of the latents are moved onto latents of the current batch.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int, decay: float = 0.995, min_share: float = 0.05):
        super().__init__()
        self.decay, self.min_share = decay, min_share
        self.embed: Tensor
        self.uses: Tensor
        self.sums: Tensor
        self.register_buffer("embed", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("uses", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("sums", torch.zeros(num_codebooks, codebook_size, dim))

    @staticmethod
    def nearest(x: Tensor, embed: Tensor) -> Tensor:
        """Index of the closest entry: `n d`, `c d` -> `n`."""
        return (x @ embed.T - 0.5 * embed.square().sum(1)).argmax(1)

    @torch.no_grad()
    def fit(self, latents: Tensor, iterations: int = 12) -> None:
        """k-means of `latents` (`n d`), residual after residual, as the starting point."""
        residual = latents
        for k in range(len(self.embed)):
            size = self.embed.shape[1]
            embed = residual[torch.randperm(len(residual))[:size]].clone()
            for _ in range(iterations):
                index = self.nearest(residual, embed)
                uses = torch.bincount(index, minlength=size).to(embed)
                sums = torch.zeros_like(embed).index_add_(0, index, residual)
                empty = uses == 0
                embed = sums / uses.clamp(min=1)[:, None]
                embed[empty] = residual[torch.randint(len(residual), (int(empty.sum()),))]
            self.embed[k] = embed
            self.uses[k].copy_(uses / len(residual)).clamp_(min=0.1 / size)
            self.sums[k] = embed * self.uses[k][:, None]
            residual = residual - embed[self.nearest(residual, embed)]

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`b d t` -> quantised latents with a straight-through gradient, codes `b k t`, commitment loss."""
        b, d, t = latents.shape
        x = latents.transpose(1, 2).reshape(-1, d)
        residual, total, codes, commitment = x, torch.zeros_like(x), [], x.new_zeros(())
        variance = x.detach().var() + 1e-8  # the encoder chooses its own scale; the loss should not depend on it
        for k in range(len(self.embed)):
            index = self.nearest(residual.detach(), self.embed[k])
            if self.training:
                self._update(k, residual.detach(), index)
            chosen = self.embed[k][index]
            commitment = commitment + F.mse_loss(residual, chosen) / variance
            total = total + chosen
            residual = residual - chosen
            codes.append(index)
        quantised = x + (total - x).detach()
        return (
            quantised.view(b, t, d).transpose(1, 2),
            torch.stack(codes).view(-1, b, t).transpose(0, 1),
            commitment / len(self.embed),
        )

    @torch.no_grad()
    def _update(self, k: int, x: Tensor, index: Tensor) -> None:
        size = self.embed.shape[1]
        uses = torch.bincount(index, minlength=size).to(x) / len(x)  # shares, so that batches of any size count alike
        sums = torch.zeros_like(self.embed[k]).index_add_(0, index, x / len(x))
        self.uses[k].mul_(self.decay).add_(uses, alpha=1 - self.decay)
        self.sums[k].mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = self.uses[k] < self.min_share / size
        if dead.any():
            self.uses[k][dead] = 1 / size
            self.sums[k][dead] = x[torch.randint(len(x), (int(dead.sum()),))] / size
        self.embed[k] = self.sums[k] / self.uses[k][:, None]


class WaveLosses(nn.Module):
    """Log-mel and log-magnitude distances at several resolutions (EnCodec, Sec. 3.4, with linear bins for pitch).

    Mel bands alone leave harmonics smeared: above 1 kHz a band is wider than a semitone.
    """

    def __init__(self, windows: tuple[int, ...] = (128, 512, 2048), num_mels: tuple[int, ...] = (20, 64, 128)):
        super().__init__()
        self.windows = windows
        for window, mels in zip(windows, num_mels, strict=True):
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mel{window}", mel_filters(window, mels), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`b t` waveforms, twice."""
        loss = estimate.new_zeros(())
        for window in self.windows:
            hann, mel = getattr(self, f"hann{window}"), getattr(self, f"mel{window}")
            x, y = (
                torch.stft(w, window, window // 4, window=hann, return_complex=True).abs().clamp(min=1e-5)
                for w in (estimate, target)
            )
            scale = window**-0.5
            x, y = x * scale, y * scale
            x_mel, y_mel = mel @ x, mel @ y
            loss = loss + F.l1_loss((x_mel + 1e-3).log(), (y_mel + 1e-3).log())
            loss = loss + F.l1_loss((x + 1e-2).log(), (y + 1e-2).log())
            loss = loss + torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp(min=1e-3)
        wave = (estimate - target).abs().mean() / target.abs().mean()
        return {"spectral": loss / len(self.windows), "wave": wave}


def mel_filters(window: int, num_mels: int) -> Tensor:
    """Triangular filters, evenly spaced in mel (O'Shaughnessy): `mels bins`."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), num_mels + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    freqs = np.fft.rfftfreq(window, 1 / SAMPLE_RATE)
    up = (freqs - edges[:-2, None]) / np.diff(edges)[:-1, None]
    down = (edges[2:, None] - freqs) / np.diff(edges)[1:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(up, down))).float()


class MagnitudeLosses(nn.Module):
    """Distances of the spectral codec's magnitudes: bin by bin, logarithmic and linear, and of the power in mel bands.

    Bin by bin alone, the best guess at noise is its median, which is too soft; bands keep its power.
    """

    def __init__(self, config: SpectralCodecConfig, num_mels: int = 96):
        super().__init__()
        self.sub_frames = config.sub_frames
        self.register_buffer("mel", mel_filters(config.window_samples, num_mels), persistent=False)

    def forward(self, given: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Log magnitudes `b (s f) t`, twice."""
        given_linear, wanted_linear = given.exp(), wanted.exp()
        bands = [
            torch.log(self.mel @ x.unflatten(1, (self.sub_frames, -1)).square() + 1e-7)
            for x in (given_linear, wanted_linear)
        ]
        linear = (given_linear - wanted_linear).abs().sum((1, 2)) / wanted_linear.sum((1, 2))
        # Halved: a power's logarithm is twice its magnitude's.
        return {"log": F.l1_loss(given, wanted), "linear": linear.mean(), "mel": 0.5 * F.l1_loss(*bands)}


@torch.no_grad()
def start_from_components(model: EncodecModel, quantizer: ResidualQuantizer, crops: "Crops", frames: int) -> None:
    """Principal components for the spectral codec's linear parts, and codebooks by k-means: a working codec at once."""
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, SpectralEncoder) and isinstance(decoder, SpectralDecoder)
    spectra = []
    while sum(map(len, spectra)) < frames:
        x = standardise(encoder.spectrum.log_magnitude(crops.batch(16)[:, None]))
        spectra.append(x.transpose(1, 2).flatten(0, 1))
    x = torch.cat(spectra)
    mean = x.mean(0)
    components = torch.linalg.eigh(torch.cov(x.T)).eigenvectors.flip(1)[:, : len(encoder.components.weight)]
    encoder.components.weight.copy_(components.T)
    encoder.components.bias.copy_(-mean @ components)
    decoder.components.weight.copy_(components)
    decoder.components.bias.copy_(mean)
    for layer in (encoder.correction[-1], decoder.last):
        layer.weight.zero_()
        layer.bias.zero_()
    quantizer.fit(encoder.components(x))


class Judge(nn.Module):
    """Discriminator of log-magnitude spectrograms, patch by patch, told where in frequency a patch lies."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96)):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(a, b, 5, stride=(3, 2), padding=2)) for a, b in itertools.pairwise((2, *widths))
        )
        self.last = norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, spectrogram: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`b f m` -> scores of patches, features of each layer."""
        height = torch.linspace(-1, 1, spectrogram.shape[1]).view(1, -1, 1).expand_as(spectrogram)
        x = torch.stack([(spectrogram + 5) / 2, height], dim=1)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features

    def own_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Hinge: above 1 for what is real, below -1 for what is not."""
        return F.relu(1 - self(real)[0]).mean() + F.relu(1 + self(fake.detach())[0]).mean()

    def losses_of_decoder(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """What the decoder is to make small: being found out, and features unlike those of the real thing."""
        self.requires_grad_(False)
        with torch.no_grad():
            wanted = self(real)[1]
        scores, features = self(fake)
        self.requires_grad_(True)
        distances = [F.l1_loss(x, y) / y.abs().mean() for x, y in zip(features, wanted, strict=True)]
        return {"adversarial": F.relu(1 - scores).mean(), "features": torch.stack(distances).mean()}


class Crops:
    """Random crops of folders of 16 kHz mono files, which are held in memory: 115 MB per hour."""

    def __init__(self, folders: list[Path], crop_s: float, seed: int):
        self.length = round(crop_s * SAMPLE_RATE)
        self.rng = np.random.default_rng(seed)
        files = sorted(p for f in folders for p in f.glob("*.flac") if not p.name.startswith("."))
        self.waves = [soundfile.read(p, dtype="int16")[0] for p in tqdm(files, desc="reading", unit="file")]
        self.waves = [w for w in self.waves if len(w) >= self.length]
        if not self.waves:
            raise SystemExit(f"{folders}: no .flac files; render music first (random_music.py, render.py)")

    def batch(self, size: int) -> Tensor:
        """`size t`, none of them silent."""
        crops = []
        while len(crops) < size:
            wav = self.waves[self.rng.integers(len(self.waves))]
            start = self.rng.integers(len(wav) - self.length + 1)
            crop = wav[start : start + self.length].astype(np.float32) / 32768
            if np.abs(crop).max() > 1e-3:
                # Levels vary in the wild; a codec that has seen one loudness only fails on the others.
                crops.append(crop * 10 ** (self.rng.uniform(-6, 3) / 20))
        return torch.from_numpy(np.stack(crops).clip(-1, 1))


def export(model: EncodecModel, quantizer: ResidualQuantizer, folder: Path) -> None:
    """Write the codebooks into `model` and save it in half precision, an EnCodec as transformers does."""
    for layer, embed in zip(model.quantizer.layers, quantizer.embed, strict=True):
        layer.codebook.embed.copy_(embed)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    half = {k: v for k, v in half.items() if not k.endswith(("embed_avg", "cluster_size", "inited"))}
    if isinstance(model.encoder, SpectralEncoder):
        save_codec(model, half, folder)
    else:
        model.save_pretrained(folder, state_dict=half)


class Codec(nn.Module):
    """What is trained: encoder, quantiser of ours, decoder; and its losses, of waves or of magnitudes."""

    def __init__(self, architecture: str):
        super().__init__()
        self.is_spectral = architecture == "spectral"
        self.model = build(SpectralCodecConfig()) if self.is_spectral else EncodecModel(encodec_config())
        config = self.model.config
        self.quantizer = ResidualQuantizer(config.num_quantizers, config.codebook_size, config.codebook_dim)
        self.spectrum = Spectrum(SpectralCodecConfig())
        self.losses = MagnitudeLosses(SpectralCodecConfig()) if self.is_spectral else WaveLosses()

    def compare(self, latents: Tensor, wav: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses of what the decoder makes of `latents`; log magnitudes of the original and of that."""
        real = self.spectrum.log_magnitude(wav[:, None])
        if self.is_spectral:
            fake = self.model.decoder.log_magnitude(latents)
            losses = self.losses(fake, real)
        else:
            out = self.model.decoder(latents)[:, :, : wav.shape[1]]
            fake = self.spectrum.log_magnitude(out)
            losses = self.losses(out[:, 0], wav)
        return losses, self._picture(real), self._picture(fake)

    def _picture(self, log_magnitude: Tensor) -> Tensor:
        """`b (s f) t` -> `b f (t s)`"""
        return log_magnitude.unflatten(1, (-1, self.spectrum.bins)).permute(0, 2, 3, 1).flatten(2)


@torch.no_grad()
def evaluate(codec: Codec, folder: Path, count: int = 24) -> dict[str, float]:
    """Losses on the first 10 s of `count` files, and the share of each codebook's entries that they use."""
    codec.quantizer.eval()
    files = sorted(folder.glob("*.flac"))
    files = files[:: max(1, len(files) // count)]
    used = [set() for _ in codec.quantizer.embed]
    sums: dict[str, float] = {}
    for path in files:
        wav = torch.from_numpy(soundfile.read(path, frames=10 * SAMPLE_RATE, dtype="float32")[0])
        wav = wav[None, : len(wav) // 320 * 320]
        latents, codes, _ = codec.quantizer(codec.model.encoder(wav[:, None]))
        for k, entries in enumerate(used):
            entries.update(codes[0, k].tolist())
        for name, value in codec.compare(latents, wav)[0].items():
            sums[f"heldout_{name}"] = sums.get(f"heldout_{name}", 0) + value.item() / len(files)
    codec.quantizer.train()
    return sums | {f"used{k}": len(u) / codec.quantizer.embed.shape[1] for k, u in enumerate(used)}


def save_atomically(state: dict, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


WEIGHTS = {
    "commitment": 0.25, "spectral": 1.0, "wave": 0.3, "log": 1.0, "linear": 0.5, "mel": 1.0,
    "adversarial": 0.05, "features": 0.3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, nargs="+", required=True, help="Folders of 16 kHz mono .flac files.")
    parser.add_argument("--heldout", type=Path, help="Folder of files to report on; of other scores than --audio.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for checkpoint, log and exported model.")
    parser.add_argument("--minutes", type=float, default=60, help="Length of this phase, in minutes of wall clock.")
    parser.add_argument("--decoder", action="store_true", help="Second phase: train the decoder alone; codes stay.")
    parser.add_argument("--adversarial", action="store_true", help="Add a discriminator's losses to the phase.")
    parser.add_argument("--architecture", choices=("spectral", "encodec"), default="spectral", help="What to train.")
    parser.add_argument("--batch", type=int, default=12, help="Crops per step.")
    parser.add_argument("--crop_s", type=float, default=1.0, help="Length of a crop, in seconds.")
    parser.add_argument("--lr", type=float, default=6e-4, help="Highest learning rate.")
    parser.add_argument("--report_s", type=float, default=120, help="Time between reports, in seconds.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and crops.")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # decaying notes are full of them, and each costs a hundred multiplications
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    codec, judge = Codec(args.architecture), Judge()
    model, quantizer = codec.model, codec.quantizer
    model.encoder.requires_grad_(not args.decoder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-4)
    judge_optimizer = torch.optim.AdamW(judge.parameters(), lr=args.lr / 2, betas=(0.8, 0.99))
    state = {"phase": "decoder" if args.decoder else "whole", "elapsed": 0.0, "step": 0}
    parts = {"model": model, "quantizer": quantizer, "judge": judge}
    of_phase = {"optimizer": optimizer, "judge_optimizer": judge_optimizer}
    checkpoint = args.out / "checkpoint.pt"
    is_new = not checkpoint.exists()
    if not is_new:
        saved = torch.load(checkpoint, weights_only=True)
        state["step"] = saved["step"]
        if saved["phase"] == state["phase"]:
            state["elapsed"] = saved["elapsed"]
            parts |= of_phase
        for name, part in parts.items():
            if name in saved:
                part.load_state_dict(saved[name])

    def save() -> None:
        everything = {name: part.state_dict() for name, part in (parts | of_phase).items()}
        save_atomically(state | everything, checkpoint)
        export(model, quantizer, args.out / "export")

    crops = Crops(args.audio, args.crop_s, args.seed + state["step"])
    if is_new and codec.is_spectral:
        start_from_components(model, quantizer, crops, frames=300_000)
    # EnCodec is a plain autoencoder first, so that k-means finds latents worth clustering; components are at once.
    warm_up_steps = 0 if codec.is_spectral else 150
    start, last_report, last_save = time.monotonic() - state["elapsed"], time.monotonic(), time.monotonic()
    running: dict[str, list[float]] = {}
    while (progress := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        state["elapsed"] = time.monotonic() - start
        factor = min(1.0, (state["step"] + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = args.lr * factor
        wav = crops.batch(args.batch)
        losses: dict[str, Tensor] = {}
        if args.decoder:
            quantizer.eval()
            with torch.no_grad():
                latents, _, _ = quantizer(model.encoder(wav[:, None]))
        else:
            if state["step"] == warm_up_steps and not quantizer.embed.any():
                with torch.no_grad():
                    many = [model.encoder(crops.batch(args.batch)[:, None]) for _ in range(30)]
                quantizer.fit(torch.cat(many).transpose(1, 2).flatten(0, 1))
            latents = model.encoder(wav[:, None])
            if state["step"] >= warm_up_steps:
                latents, _, losses["commitment"] = quantizer(latents)
        of_wave, real, fake = codec.compare(latents, wav)
        losses |= of_wave
        if args.adversarial:
            judge_loss = judge.own_loss(real, fake)
            judge_optimizer.zero_grad()
            judge_loss.backward()
            judge_optimizer.step()
            losses |= judge.losses_of_decoder(real, fake)
            running.setdefault("judge", []).append(judge_loss.item())
        loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        state["step"] += 1
        for name, value in losses.items():
            running.setdefault(name, []).append(value.item())

        if time.monotonic() - last_report > args.report_s:
            last_report = time.monotonic()
            record = state | {name: float(np.mean(values)) for name, values in running.items()}
            if args.heldout and state["step"] > warm_up_steps:
                record |= evaluate(codec, args.heldout)
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)
            running = {}
        if time.monotonic() - last_save > 300:
            last_save = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main()
