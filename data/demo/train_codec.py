"""Trains the demo's codec: the spectral one that ships, or a small EnCodec, which wants a GPU.

transformers' `EncodecModel` can run a codec but not train one: it has no straight-through estimator, no
commitment loss and no codebook update. So its own encoder and decoder are trained here around a quantiser
of ours, whose codebooks are then written into the model. `tests/test_codec.py` checks that both give the
same codes.

EnCodec has a second phase, `--adversarial`: its decoder alone, against discriminators. The codes stay as they are.

The run is measured in minutes, not steps: the learning rate follows the clock, so a busy machine ends with
a finished model all the same. It resumes from its last checkpoint.

    python data/demo/train_codec.py --audio AUDIO/random AUDIO/train --out RUN --minutes 50
    python data/demo/train_codec.py --audio AUDIO/random AUDIO/train --out RUN --minutes 60 --architecture encodec
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

from magnet_train.spectral_codec import SpectralCodecConfig, SpectralDecoder, SpectralEncoder, build, save_codec

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

    Entries that fall out of use are moved onto latents of the current batch.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int, decay: float = 0.98, min_uses: float = 1.0):
        super().__init__()
        self.decay, self.min_uses = decay, min_uses
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
            self.uses[k].fill_(len(residual) / size)
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
        uses = torch.bincount(index, minlength=size).to(x)
        sums = torch.zeros_like(self.embed[k]).index_add_(0, index, x)
        self.uses[k].mul_(self.decay).add_(uses, alpha=1 - self.decay)
        self.sums[k].mul_(self.decay).add_(sums, alpha=1 - self.decay)
        # `uses` averages to n / size per step; an entry far below its fair share is as good as dead.
        dead = self.uses[k] < 0.2 * len(x) / size * self.min_uses
        if dead.any():
            self.sums[k][dead] = x[torch.randint(len(x), (int(dead.sum()),))]
            self.uses[k][dead] = 1.0
        self.embed[k] = self.sums[k] / self.uses[k][:, None]


class SpectralLoss(nn.Module):
    """Log-mel and log-magnitude distances at several resolutions (EnCodec, Sec. 3.4, with linear bins for pitch).

    Mel bands alone leave harmonics smeared: above 1 kHz a band is wider than a semitone.
    """

    def __init__(self, windows: tuple[int, ...] = (128, 512, 2048), num_mels: tuple[int, ...] = (20, 64, 128)):
        super().__init__()
        self.windows = windows
        for window, mels in zip(windows, num_mels, strict=True):
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mel{window}", mel_filters(window, mels), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """`b t` waveforms -> scalar."""
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
        return loss / len(self.windows)


def mel_filters(window: int, num_mels: int) -> Tensor:
    """Triangular filters, evenly spaced in mel (O'Shaughnessy): `mels bins`."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), num_mels + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    freqs = np.fft.rfftfreq(window, 1 / SAMPLE_RATE)
    up = (freqs - edges[:-2, None]) / np.diff(edges)[:-1, None]
    down = (edges[2:, None] - freqs) / np.diff(edges)[1:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(up, down))).float()


def magnitude_losses(decoder: SpectralDecoder, latents: Tensor, wav: Tensor) -> dict[str, Tensor]:
    """Distances of the spectral codec's magnitudes: logarithmic, for what is soft, and linear, for what is loud."""
    with torch.no_grad():
        wanted = decoder.spectrum.log_magnitude(wav[:, None])
    given = decoder.log_magnitude(latents)
    linear = (given.exp() - wanted.exp()).abs().sum((1, 2)) / wanted.exp().sum((1, 2))
    return {"log": F.l1_loss(given, wanted), "linear": linear.mean()}


class StftDiscriminator(nn.Module):
    """One scale of EnCodec's multi-scale STFT discriminator (Sec. 3.4): real and imaginary part as two channels."""

    def __init__(self, window: int, channels: int = 16):
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        norm = nn.utils.parametrizations.weight_norm
        widths = [2, channels, channels, channels * 2, channels * 2]
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(a, b, (3, 9), stride=(1, 2), padding=(1, 4))) for a, b in itertools.pairwise(widths)
        )
        self.last = norm(nn.Conv2d(widths[-1], 1, (3, 3), padding=(1, 1)))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`b t` -> scores, features of each layer."""
        spec = torch.stft(wav, self.window, self.window // 4, window=self.hann, return_complex=True, normalized=True)
        x = torch.view_as_real(spec).permute(0, 3, 2, 1)  # b 2 frames bins
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class Crops:
    """Random crops of folders of 16 kHz mono files; files that appear later are found by `rescan`."""

    def __init__(self, folders: list[Path], crop_s: float, seed: int):
        self.folders, self.length = folders, round(crop_s * SAMPLE_RATE)
        self.rng = np.random.default_rng(seed)
        self.rescan()

    def rescan(self) -> None:
        self.files = sorted(p for f in self.folders for p in f.glob("*.flac") if not p.name.startswith("."))
        if not self.files:
            raise SystemExit(f"{self.folders}: no .flac files; render music first (random_music.py, render.py)")

    def batch(self, size: int) -> Tensor:
        crops = []
        while len(crops) < size:
            path = self.files[self.rng.integers(len(self.files))]
            start = self.rng.integers(max(1, soundfile.info(path).frames - self.length))
            wav, _ = soundfile.read(path, frames=self.length, start=int(start), dtype="float32")
            if len(wav) == self.length and np.abs(wav).max() > 1e-3:
                # Levels vary in the wild; a codec that has seen one loudness only fails on the others.
                crops.append(wav * 10 ** (self.rng.uniform(-6, 3) / 20))
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


@torch.no_grad()
def evaluate(model: EncodecModel, quantizer: ResidualQuantizer, folder: Path, count: int = 24) -> dict[str, float]:
    """Distances on the first 10 s of `count` files: log-mel L1, SI-SDR in dB, share of entries used per codebook."""
    quantizer.eval()
    files = sorted(folder.glob("*.flac"))[:count]
    used = [set() for _ in quantizer.embed]
    mel, hann, distances, sdrs = mel_filters(1024, 80), torch.hann_window(1024), [], []
    for path in files:
        wav = torch.from_numpy(soundfile.read(path, frames=10 * SAMPLE_RATE, dtype="float32")[0])
        wav = wav[: len(wav) // 320 * 320]
        latents, codes, _ = quantizer(model.encoder(wav[None, None]))
        out = model.decoder(latents)[0, 0]
        for k, entries in enumerate(used):
            entries.update(codes[0, k].tolist())
        a, b = (
            (mel @ torch.stft(w, 1024, 256, window=hann, return_complex=True).abs()).clamp(min=1e-2).log10()
            for w in (wav, out)
        )
        distances.append(F.l1_loss(a, b).item())
        scaled = (out @ wav) / (wav @ wav) * wav
        sdrs.append(10 * math.log10(scaled.square().sum() / (out - scaled).square().sum()))
    quantizer.train()
    shares = {f"used{k}": len(u) / quantizer.embed.shape[1] for k, u in enumerate(used)}
    return {"mel_l1": float(np.mean(distances)), "si_sdr_db": float(np.mean(sdrs)), **shares}


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, nargs="+", required=True, help="Folders of 16 kHz mono .flac files.")
    parser.add_argument("--heldout", type=Path, help="Folder of files to report on; of other scores than --audio.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for checkpoint, log and exported model.")
    parser.add_argument("--minutes", type=float, default=60, help="Length of this phase, in minutes of wall clock.")
    parser.add_argument("--adversarial", action="store_true", help="Train only the decoder, against discriminators.")
    parser.add_argument("--architecture", choices=("spectral", "encodec"), default="spectral", help="What to train.")
    parser.add_argument("--batch", type=int, default=8, help="Crops per step.")
    parser.add_argument("--crop_s", type=float, default=1.0, help="Length of a crop, in seconds.")
    parser.add_argument("--lr", type=float, default=1e-3, help="Highest learning rate.")
    parser.add_argument("--report_s", type=float, default=120, help="Time between reports, in seconds.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and crops.")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # decaying notes are full of them, and each costs a hundred multiplications
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(SpectralCodecConfig()) if args.architecture == "spectral" else EncodecModel(encodec_config())
    config = model.config
    quantizer = ResidualQuantizer(config.num_quantizers, config.codebook_size, config.codebook_dim)
    spectral = SpectralLoss()
    checkpoint, phase = args.out / "checkpoint.pt", "adversarial" if args.adversarial else "whole"
    state = {"phase": phase, "elapsed": 0.0, "step": 0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        quantizer.load_state_dict(saved["quantizer"])
        state["step"] = saved["step"]
        if saved["phase"] == phase:
            state["elapsed"] = saved["elapsed"]
    warm_up_steps = 150  # a plain autoencoder first, so that k-means finds latents worth clustering

    generator = list(model.decoder.parameters())
    if not args.adversarial:
        generator += list(model.encoder.parameters())
    optimizer = torch.optim.AdamW(generator, lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-4)
    judges = nn.ModuleList(StftDiscriminator(w) for w in (256, 512, 1024)) if args.adversarial else nn.ModuleList()
    judge_optimizer = (
        torch.optim.AdamW(judges.parameters(), lr=args.lr, betas=(0.8, 0.99)) if args.adversarial else None
    )
    if checkpoint.exists() and saved["phase"] == phase:
        optimizer.load_state_dict(saved["optimizer"])
        if judge_optimizer:
            judges.load_state_dict(saved["judges"])
            judge_optimizer.load_state_dict(saved["judge_optimizer"])
    if args.adversarial:
        model.encoder.requires_grad_(False)

    def save() -> None:
        save_atomically(
            dict(state, model=model.state_dict(), quantizer=quantizer.state_dict(), optimizer=optimizer.state_dict(),
                 judges=judges.state_dict(), judge_optimizer=judge_optimizer.state_dict() if judge_optimizer else None),
            checkpoint,
        )  # fmt: skip
        export(model, quantizer, args.out / "export")

    crops = Crops(args.audio, args.crop_s, args.seed + state["step"])
    start, last_report, last_save = time.monotonic() - state["elapsed"], time.monotonic(), time.monotonic()
    running: dict[str, float] = {}
    while (progress := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        state["elapsed"] = time.monotonic() - start
        lr = args.lr * min(1.0, (state["step"] + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups + (judge_optimizer.param_groups if judge_optimizer else []):
            group["lr"] = lr
        wav = crops.batch(args.batch)
        losses: dict[str, Tensor] = {}
        if args.adversarial:
            with torch.no_grad():
                quantizer.eval()
                latents, _, _ = quantizer(model.encoder(wav[:, None]))
        else:
            latents = model.encoder(wav[:, None])
            if state["step"] == warm_up_steps and not quantizer.embed.any():
                with torch.no_grad():
                    many = [model.encoder(crops.batch(args.batch)[:, None]) for _ in range(30)]
                quantizer.fit(torch.cat(many).transpose(1, 2).flatten(0, 1))
            if state["step"] >= warm_up_steps:
                latents, _, losses["commitment"] = quantizer(latents)
        if isinstance(model.decoder, SpectralDecoder):
            losses |= magnitude_losses(model.decoder, latents, wav)
        else:
            out = model.decoder(latents)[:, 0, : wav.shape[1]]
            losses["spectral"] = spectral(out, wav)
            losses["wave"] = (out - wav).abs().mean() / wav.abs().mean()
        if judge_optimizer:
            real_and_fake = [(judge(wav), judge(out.detach())) for judge in judges]
            judge_loss = sum(
                F.relu(1 - real).mean() + F.relu(1 + fake).mean() for (real, _), (fake, _) in real_and_fake
            ) / len(judges)
            judge_optimizer.zero_grad()
            judge_loss.backward()
            judge_optimizer.step()
            judges.requires_grad_(False)
            scores = [judge(out) for judge in judges]
            judges.requires_grad_(True)
            losses["adversarial"] = sum(F.relu(1 - s).mean() for s, _ in scores) / len(judges)
            losses["features"] = sum(
                F.l1_loss(f, r.detach()) / r.detach().abs().mean()
                for (_, fakes), ((_, reals), _) in zip(scores, real_and_fake, strict=True)
                for f, r in zip(fakes, reals, strict=True)
            ) / (len(judges) * len(scores[0][1]))
            running["judge"] = running.get("judge", 0) + judge_loss.item()
        weights = {
            "commitment": 0.25,
            "spectral": 1.0,
            "wave": 0.3,
            "adversarial": 0.3,
            "features": 1.0,
            "log": 1.0,
            "linear": 1.0,
        }
        loss = sum(weights[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(generator, 3.0)
        optimizer.step()
        state["step"] += 1
        for name, value in losses.items():
            running[name] = running.get(name, 0) + value.item()
        running["steps"] = running.get("steps", 0) + 1

        if time.monotonic() - last_report > args.report_s:
            last_report = time.monotonic()
            steps = running.pop("steps")
            record = dict(state, lr=lr, files=len(crops.files)) | {k: v / steps for k, v in running.items()}
            if args.heldout and state["step"] > warm_up_steps:
                record |= evaluate(model, quantizer, args.heldout)
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)
            running = {}
            crops.rescan()
        if time.monotonic() - last_save > 300:
            last_save = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main()
