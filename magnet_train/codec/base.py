"""The codec: waveforms to codes and back, and the facts about it that shards, model and metrics depend on.

transformers' `EncodecModel` does the work, with the weights and the padding mode of whichever files it is given: its
own, the `encodec` package's 24 and 48 kHz models, or (see convert.py) a compression model of audiocraft.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magnet_train.codec.encodec_names import PACKAGE_MODELS, PACKAGE_URL, to_transformers
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import load_pretrained, one_line
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

# Running averages that only a training of the codec reads.
TRAINING_BUFFERS = ("embed_avg", "cluster_size", "inited")
# Settings that decide the codes but leave no trace in the names or shapes of the weights.
DECISIVE_SETTINGS = ("pad_mode", "upsampling_ratios", "use_causal_conv", "dilation_growth_rate")
NORMALISED_LEVEL = 0.1
"""RMS level, -20 dB of full scale, at which a codec that normalises its input gives audio back."""


@dataclass(frozen=True)
class CodecFacts:
    """What must agree between shards, model and codec."""

    id: str
    """Name that `load_codec` takes: "demo", a hub id, or an absolute folder."""
    hash: str
    """First 16 hex digits of a SHA-256 over all that decides the codes: encoder, codebooks, padding mode, ratios."""
    sample_rate: int
    """Of the waveform, in Hz."""
    frame_rate: float
    """Codec steps per second, in Hz."""
    num_codebooks: int
    """Codes per frame."""
    codebook_size: int
    """Entries in each codebook."""
    channels: int
    """Of the waveform: 1 or 2."""
    pad_mode: str
    """How the convolutions pad the ends of a clip; it comes with the weights and changes a quarter of the codes."""

    @property
    def hop_samples(self) -> int:
        """Samples per frame."""
        return round(self.sample_rate / self.frame_rate)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CodecFacts":
        """The inverse of `to_dict`; fields it does not know are ignored, so that older readers read newer shards.

        Raises:
            ValueError: if a field is missing.
        """
        names = [f.name for f in fields(cls)]
        if missing := [n for n in names if n not in values]:
            raise ValueError(f"codec facts lack {', '.join(missing)}")
        return cls(**{n: values[n] for n in names})


class Codec(nn.Module):
    """A frozen EnCodec, always in evaluation mode and in float32, with no gradient.

    It is no part of what is trained. A LightningModule keeps it in a tuple, not as an attribute, so that it enters
    neither checkpoints nor precision changes, and moves it to its device by hand.

    The 48 kHz EnCodec normalises its input and works in chunks of a second. Here a clip is normalised as a whole, so
    that its louder and softer parts stay so, and cut into chunks without overlap, so that frames come at a steady
    rate; the level itself, which is in no code, is lost: the audio comes back at `NORMALISED_LEVEL`.
    """

    def __init__(self, model: Any, name: str, num_codebooks: int | None = None):
        """Takes `model` over: its weight normalisation is folded into plain weights.

        Args:
            model: A trained transformers EncodecModel.
            name: Its id in the facts.
            num_codebooks: Only the first so many are used; all if None.

        Raises:
            UserError: if a codebook is all zero, a weight is not finite, or there are fewer codebooks than asked for.
        """
        super().__init__()
        config = model.config
        if num_codebooks is not None:
            if not 1 <= num_codebooks <= len(model.quantizer.layers):
                raise UserError(
                    f"codec {name!r}: it has {len(model.quantizer.layers)} codebooks; ask for that many or fewer"
                )
            model.quantizer.layers = model.quantizer.layers[:num_codebooks]
        model = model.float().eval().requires_grad_(False)
        weights = _decisive_weights(model)
        for key, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"codec {name!r}: {key} holds NaN or infinite values; download or train it again")
            if key.endswith("codebook.embed") and not tensor.any():
                raise UserError(
                    f"codec {name!r}: {key} is all zero, as in a model that was never trained; choose another"
                )
        settings = {s: getattr(config, s) for s in DECISIVE_SETTINGS}
        if config.normalize or config.chunk_length_s:
            settings |= {"normalize": config.normalize, "chunk_length_s": config.chunk_length_s}
        self.normalizes = bool(config.normalize)
        self.chunk_frames = (
            round(config.chunk_length_s * config.sampling_rate / config.hop_length) if (config.chunk_length_s) else None
        )
        self.facts = CodecFacts(
            id=name,
            hash=_hash(weights, settings),
            sample_rate=config.sampling_rate,
            frame_rate=config.sampling_rate / config.hop_length,
            num_codebooks=len(model.quantizer.layers),
            codebook_size=config.codebook_size,
            channels=config.audio_channels,
            pad_mode=config.pad_mode,
        )
        for module in model.modules():
            if nn.utils.parametrize.is_parametrized(module, "weight"):
                # The same weights, no longer computed anew in each call.
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        self.model = model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.quantizer.layers[0].codebook.embed.device

    @property
    def codebooks(self) -> Tensor:
        """Entries, `k c e`."""
        return torch.stack([layer.codebook.embed for layer in self.model.quantizer.layers])

    def __deepcopy__(self, memo: dict) -> "Codec":
        """Itself: it never changes, so a copy of what holds it needs none of its own."""
        return self

    def train(self, mode: bool = True) -> "Codec":
        """Stays in evaluation mode whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """`b c t` float waveform, in -1 .. 1, at the codec's sample rate -> codes `b k t`, int64.

        A clip of n samples gives ceil(n / hop_samples) frames. Stereo is averaged for a mono codec, and mono is
        doubled for a stereo one. Precision is full float32 whatever the trainer has set: a rounding can turn one
        code into another.

        Raises:
            ValueError: if `wav` is not a non-empty float tensor of three axes with 1 or 2 channels.
            UserError: if it holds NaN or infinite values.
        """
        if wav.dim() != 3 or wav.shape[1] not in (1, 2) or wav.numel() == 0 or not wav.is_floating_point():
            raise ValueError(f"wav must be float `b c t` with 1 or 2 channels, got {wav.dtype} {tuple(wav.shape)}")
        wav = wav.to(self.device, torch.float32)
        if not torch.isfinite(wav).all():
            raise UserError("the audio holds NaN or infinite samples; repair or remove the file")
        if wav.shape[1] != self.facts.channels:
            wav = wav.mean(1, keepdim=True) if self.facts.channels == 1 else wav.expand(-1, self.facts.channels, -1)
        if self.normalizes:
            wav = wav / (wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
        with _plain_float32(wav.device):
            # transformers' own encode() picks a bandwidth by rounding floats and adds an axis for chunks.
            chunks = [wav] if self.chunk_frames is None else wav.split(self.chunk_frames * self.facts.hop_samples, 2)
            codes = torch.cat([self.model.quantizer.encode(self.model.encoder(chunk)) for chunk in chunks], 2)
        return codes.transpose(0, 1).contiguous()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b k t` in 0 .. codebook_size - 1 -> waveform `b c t` of t * hop_samples samples, float32.

        The first codebooks alone decode too (k < num_codebooks): a coarser version of the same sound.

        Raises:
            ValueError: if `codes` is not a non-empty integer tensor of three axes with 1 to num_codebooks codebooks.
            UserError: if a value is no entry of the codebooks, such as a mask id that decoding left behind.
        """
        size = self.facts.codebook_size
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.facts.num_codebooks or codes.numel() == 0:
            raise ValueError(f"codes must be `b k t` with k <= {self.facts.num_codebooks}, got {tuple(codes.shape)}")
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        codes = codes.to(self.device, torch.int64)
        wrong = (codes < 0) | (codes >= size)
        if wrong.any():
            value = codes[wrong][0].item()
            cause = "the mask id: decoding left these unfilled" if value == size else "they come from another codec"
            raise UserError(f"{int(wrong.sum())} codes are outside 0 .. {size - 1}, the first is {value} ({cause})")
        with _plain_float32(codes.device):
            chunks = [codes] if self.chunk_frames is None else codes.split(self.chunk_frames, 2)
            wav = torch.cat([self.model.decoder(self.model.quantizer.decode(c.transpose(0, 1))) for c in chunks], 2)
        return wav * NORMALISED_LEVEL if self.normalizes else wav


def split_name(name: str) -> tuple[str, int | None]:
    """A codec's name without `@8`, and the 8; a folder that is called so wins.

    >>> split_name("facebook/encodec_24khz@8")
    ('facebook/encodec_24khz', 8)
    >>> split_name("me@home")
    ('me@home', None)
    """
    base, at, first = name.rpartition("@")
    if not at or not first.isdigit() or Path(name).expanduser().exists():
        return name, None
    return base, int(first)


def absolute_name(name: str) -> str:
    """A codec's name that holds in every working directory: folders by their whole path, all else as it is."""
    base, first = split_name(name)
    path = Path(base).expanduser()
    if base == "demo" or not path.exists():
        return name
    return str(path.resolve()) + ("" if first is None else f"@{first}")


def load_codec(name: str = "demo") -> Codec:
    """The codec of that name, on the CPU.

    Args:
        name: "demo" for the embedded one, else a folder that transformers' EncodecModel wrote, a hub id such as
            `facebook/encodec_32khz`, or `encodec_24khz` or `encodec_48khz` for the models of the `encodec` package.
            `NAME@8` uses only its first 8 codebooks.

    Raises:
        UserError: if it is missing, broken, untrained, no EnCodec, or out of reach without network.
    """
    base, num_codebooks = split_name(name)
    if base in PACKAGE_MODELS and not Path(base).expanduser().exists():
        return Codec(_package_model(base), name, num_codebooks)
    source, known_as = str(demo_path("codec")) if base == "demo" else base, absolute_name(name)

    def load(source: str, local_files_only: bool) -> Codec:
        return Codec(_load(source, local_files_only, known_as), known_as, num_codebooks)

    return load_pretrained("codec", source, load)


def _load(source: str, local_files_only: bool, name: str) -> Any:
    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    kind = EncodecConfig.get_config_dict(source, local_files_only=local_files_only)[0].get("model_type")
    if kind == "magnet_train_spectral":
        from magnet_train.codec.spectral import load_spectral_codec

        return load_spectral_codec(Path(source))
    if kind != "encodec":
        raise UserError(f"codec {name!r}: its config.json describes {kind!r}, not 'encodec'; choose an EnCodec")
    loaded: Any = EncodecModel.from_pretrained(
        source, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(k for k in report["missing_keys"] if not k.endswith(TRAINING_BUFFERS))
    if missing:  # transformers would go on with random weights
        raise UserError(
            f"codec {name!r}: its weights lack {missing[0]} and {len(missing) - 1} more; use a complete copy"
        )
    return model


def _package_model(name: str) -> Any:
    """A model of the `encodec` package in transformers' class; downloaded once, and checked by its hash."""
    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    file, settings = PACKAGE_MODELS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file  # where the package itself keeps it
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(PACKAGE_URL + file, str(path), file.split("-")[1].removesuffix(".th"))
        except Exception as error:
            raise UserError(
                f"codec {name!r}: {PACKAGE_URL + file} cannot be downloaded ({one_line(error)}): "
                f"put the file to {path}, or give a local folder"
            ) from error
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        model = EncodecModel(EncodecConfig(**settings))
        model.load_state_dict({to_transformers(k): v for k, v in theirs.items()})
    except Exception as error:
        raise UserError(f"codec {name!r}: {path} is broken ({one_line(error)}); remove it, to load it anew") from error
    return model


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor bfloat16 matrix products, which Lightning's settings may have turned on."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _decisive_weights(model: nn.Module) -> dict[str, Tensor]:
    """Encoder and codebooks by name: a decoder trained further leaves the codes as they were."""
    return {
        key: tensor
        for key, tensor in sorted(model.state_dict().items())
        if key.startswith(("encoder.", "quantizer.")) and not key.endswith(TRAINING_BUFFERS)
    }


def _hash(weights: dict[str, Tensor], settings: dict[str, Any]) -> str:
    """SHA-256 of settings, names, shapes and float32 values, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, tensor in weights.items():
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]
