"""The codec: waveforms to codes and back, and its facts for shards, model and metrics.

Other modules use only the interface `Codec`: `facts`, `encode`, `decode`, `codebooks`. It checks
and prepares inputs; implementations (encodec.py, dac.py, spectral.py) have the network and choose
the weights in the hash; stereo.py uses a mono codec for each channel. `load_codec` finds the
implementation by the `model_type` in config.json.
"""

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import load_pretrained, read_model_type
from magnet_train.common.ranges import check_types, check_values

STEREO = "@stereo"
"""End of the name of a mono codec that is used for both channels of stereo."""


@dataclass(frozen=True)
class CodecFacts:
    """Facts of a codec that must agree between shards, model and codec."""

    id: str
    """Name for `load_codec`: "demo", a hub id, or an absolute folder."""
    hash: str
    """First 16 hex digits of a SHA-256 over encoder, codebooks and padding, which set the codes."""
    sample_rate: int
    """Sample rate of the waveform, in Hz."""
    frame_rate: float
    """Codec steps per second, in Hz."""
    num_codebooks: int
    """Codes per frame."""
    codebook_size: int
    """Entries in each codebook."""
    channels: int
    """Channels of the waveform, 1 or 2."""
    pad_mode: str
    """Padding at the ends of a clip; in EnCodec it changes a quarter of the codes."""

    def __post_init__(self) -> None:
        try:
            check_types(self)
            check_values(
                self,
                sample_rate="[1000, 768000] Hz",
                frame_rate=f"[0.001, {self.sample_rate}] Hz",
                num_codebooks="[1, 1024]",
                codebook_size="[1, 65536]",
                channels="[1, 2]",
            )
        except UserError as error:
            raise UserError(f"codec {self.id!r}: {error}; copy or download it again") from error

    @property
    def hop_samples(self) -> int:
        """Samples per frame."""
        return round(self.sample_rate / self.frame_rate)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CodecFacts":
        """The inverse of `to_dict`; unknown fields of newer versions are ignored.

        Raises:
            ValueError: if a field is missing.
            UserError: if a value is not possible.
        """
        names = [f.name for f in fields(cls)]
        if missing := [n for n in names if n not in values]:
            raise ValueError(f"codec facts lack {', '.join(missing)}")
        return cls(**{n: values[n] for n in names})


class Codec(nn.Module, ABC):
    """A frozen codec in float32 and evaluation mode, without gradients.

    A LightningModule keeps it in a tuple instead of an attribute, so that it is not in checkpoints
    and keeps its precision; the module moves it to its device explicitly.
    """

    facts: CodecFacts

    @property
    @abstractmethod
    def codebooks(self) -> Tensor:
        """Entries, `k c e`."""

    @abstractmethod
    def _encode(self, wav: Tensor) -> Tensor:
        """Waveform `b c t` -> codes `b k t`, int64; c is the codec's number of channels."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Valid codes `b k t` of the first k codebooks -> waveform `b c t`."""

    def _decode_beside(self, codes: Tensor, known: Tensor) -> Tensor:
        """`_decode` beside `known` audio, for codecs that reconstruct phases (see `decode`)."""
        return self._decode(codes)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def __deepcopy__(self, memo: dict) -> "Codec":
        """Returns itself, because a codec never changes."""
        return self

    def train(self, mode: bool = True) -> "Codec":
        """Always stays in evaluation mode."""
        return super().train(False)

    def batch_key(self, num_samples: int) -> int:
        """Clips with the same key share a batch in `encode_clips`: those of equal length, unless
        the codec computes padded clips as if they were alone.
        """
        return num_samples

    def _encode_padded(self, wav: Tensor, lengths: list[int]) -> Tensor:
        """`_encode` of clips with one `batch_key`, which have these lengths, in samples, and zeros
        behind them.
        """
        return self._encode(wav)

    def encode_clips(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Codes `k t` of each clip `c t`, as `encode` gives for it alone, in few batches.

        Raises:
            ValueError, UserError: as `encode`.
        """
        batches: dict[int, list[int]] = {}
        for number, clip in enumerate(clips):
            batches.setdefault(self.batch_key(clip.shape[1]), []).append(number)
        codes: dict[int, Tensor] = {}
        for numbers in batches.values():
            lengths = [clips[number].shape[1] for number in numbers]
            wav = pad_sequence([clips[number].T for number in numbers], batch_first=True)
            found = self.encode(wav.transpose(1, 2), lengths)
            for number, length, row in zip(numbers, lengths, found, strict=True):
                codes[number] = row[:, : math.ceil(length / self.facts.hop_samples)]
        return [codes[number] for number in range(len(clips))]

    @torch.no_grad()
    def encode(self, wav: Tensor, lengths: list[int] | None = None) -> Tensor:
        """`b c t` float waveform, in -1 .. 1, at the codec's sample rate -> codes `b k t`, int64.

        A clip of n samples gives ceil(n / hop_samples) frames. Stereo is averaged for a mono codec,
        and mono is duplicated for a stereo codec. Always computed in full float32, because rounding
        can change codes.

        Args:
            wav: The clips.
            lengths: Samples of each clip, if zeros follow (see `encode_clips`).

        Raises:
            ValueError: if `wav` is not a non-empty float tensor of three axes with 1 or 2 channels.
            UserError: if it contains NaN or infinite values.
        """
        if (
            wav.dim() != 3
            or wav.shape[1] not in (1, 2)
            or wav.numel() == 0
            or not wav.is_floating_point()
        ):
            raise ValueError(
                "wav must be float `b c t` with 1 or 2 channels, "
                f"got {wav.dtype} {tuple(wav.shape)}"
            )
        wav = wav.to(self.device, torch.float32)
        if not torch.isfinite(wav).all():
            raise UserError("the audio has NaN or infinite samples; repair or remove the file")
        if wav.shape[1] != self.facts.channels:
            wav = (
                wav.mean(1, keepdim=True)
                if self.facts.channels == 1
                else wav.expand(-1, self.facts.channels, -1)
            )
        with _plain_float32(wav.device):
            return self._encode(wav) if lengths is None else self._encode_padded(wav, lengths)

    @torch.no_grad()
    def decode(self, codes: Tensor, known: Tensor | None = None) -> Tensor:
        """Codes `b k t` in 0 .. codebook_size - 1 -> waveform `b c (t hop_samples)`, float32.

        Codes of the first codebooks only (k < num_codebooks) give a coarser version of the sound.

        Args:
            codes: The codes.
            known: Audio that the result is joined with, shaped like the result, NaN where there is
                none. A codec that reconstructs phases continues those of `known`; others ignore it.

        Raises:
            ValueError: if `codes` is not a non-empty integer tensor of three axes with 1 to
                num_codebooks codebooks, or `known` has another shape than the result.
            UserError: if a value is not an entry of the codebooks, such as the mask id.
        """
        size = self.facts.codebook_size
        if (
            codes.dim() != 3
            or not 1 <= codes.shape[1] <= self.facts.num_codebooks
            or codes.numel() == 0
        ):
            raise ValueError(
                f"codes must be `b k t` with k <= {self.facts.num_codebooks}, "
                f"got {tuple(codes.shape)}"
            )
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        codes = codes.to(self.device, torch.int64)
        wrong = (codes < 0) | (codes >= size)
        if wrong.any():
            value = codes[wrong][0].item()
            cause = (
                "the mask id: these are still masked"
                if value == size
                else "they come from another codec"
            )
            raise UserError(
                f"{int(wrong.sum())} codes are outside 0 .. {size - 1}, "
                f"the first is {value} ({cause})"
            )
        with _plain_float32(codes.device):
            if known is None:
                return self._decode(codes)
            shape = (len(codes), self.facts.channels, codes.shape[2] * self.facts.hop_samples)
            if known.shape != shape:
                raise ValueError(f"known must be {shape}, got {tuple(known.shape)}")
            return self._decode_beside(codes, known.to(codes.device, torch.float32))


class NetworkCodec(Codec):
    """Base class of codecs that load a neural network.

    Implementations are made from `model, name, num_codebooks`: a trained model, which is changed in
    place; its id in the facts; and how many of its first codebooks are used (default: all).
    """

    def __init__(
        self,
        model: Any,
        name: str,
        weights: Mapping[str, Tensor],
        codebooks: Mapping[str, Tensor],
        settings: dict[str, Any],
        **facts: Any,
    ):
        """
        Args:
            model: Encoder, codebooks and decoder.
            name: Its id in the facts.
            weights: Weights that set the codes, by name.
            codebooks: Entries of each codebook, by name.
            settings: Settings that set the codes but are not in the weights.
            facts: `hop_samples` and the other fields of CodecFacts.

        Raises:
            UserError: if a codebook is all zero, a weight is not finite, or there are too few
                codebooks.
        """
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        check_weights(name, model.state_dict(), codebooks)
        frame_rate = facts["sample_rate"] / facts.pop("hop_samples")
        hash = codes_hash(weights, settings)
        self.facts = CodecFacts(id=name, hash=hash, frame_rate=frame_rate, **facts)

    @staticmethod
    @abstractmethod
    def read(source: str, local_files_only: bool, name: str) -> Any:
        """The model of a folder or hub id, in float32; `name` is for messages."""


def split_name(name: str) -> tuple[str, int | None]:
    """Splits `NAME@8` or `NAME@8@stereo` into name and 8, unless a folder has this name.

    >>> split_name("facebook/encodec_24khz@8")
    ('facebook/encodec_24khz', 8)
    >>> split_name("demo@stereo")
    ('demo', None)
    >>> split_name("me@home")
    ('me@home', None)
    """
    if not Path(name).expanduser().exists():
        name = name.removesuffix(STEREO)
    base, at, first = name.rpartition("@")
    is_number = re.fullmatch("[0-9]{1,9}", first) is not None
    if not at or not is_number or Path(name).expanduser().exists():
        return name, None
    return base, int(first)


def absolute_name(name: str) -> str:
    """A codec's name with an absolute path if it is a folder."""
    base, _ = split_name(name)
    path = Path(base).expanduser()
    if base == "demo" or not path.exists():
        return name
    return str(path.resolve()) + name.removeprefix(base)


def load_codec(name: str = "demo") -> Codec:
    """Load a codec on the CPU.

    Args:
        name: "demo" for the bundled one; a folder written by `SpectralModel.save` or transformers'
            EncodecModel or DacModel; a hub id such as `facebook/encodec_32khz` or
            `descript/dac_44khz`; or `encodec_24khz` or `encodec_48khz` for the models of the
            `encodec` package. `NAME@8` uses only its first 8 codebooks; `NAME@stereo` or
            `NAME@8@stereo` encodes the channels of stereo one by one with interleaved codebooks.

    Raises:
        UserError: if it is missing, damaged, untrained, of an unknown type, or cannot be
            downloaded.
    """
    from magnet_train.codec.dac import DacCodec
    from magnet_train.codec.encodec import EncodecCodec, load_package_model
    from magnet_train.codec.encodec_names import PACKAGE_MODELS
    from magnet_train.codec.spectral import MODEL_TYPE, SpectralCodec

    if name.endswith(STEREO) and not Path(name).expanduser().exists():
        from magnet_train.codec.stereo import StereoCodec

        return StereoCodec(load_codec(name.removesuffix(STEREO)))
    base, num_codebooks = split_name(name)
    if base in PACKAGE_MODELS and not Path(base).expanduser().exists():
        return EncodecCodec(load_package_model(base), name, num_codebooks)
    source, known_as = str(demo_path("codec")) if base == "demo" else base, absolute_name(name)

    kinds: dict[str | None, Any] = {
        MODEL_TYPE: SpectralCodec,
        "encodec": EncodecCodec,
        "dac": DacCodec,
    }

    def load(source: str, local_files_only: bool) -> Codec:
        kind = _model_type(source, local_files_only)
        if kind not in kinds:
            raise UserError(
                f"codec {known_as!r}: its config.json describes {kind!r}, not 'encodec' or 'dac'; "
                "choose an EnCodec or a DAC"
            )
        model = kinds[kind].read(source, local_files_only, known_as)
        return kinds[kind](model, known_as, num_codebooks)

    return load_pretrained("codec", source, load)


def load_codec_facts(name: str = "demo") -> CodecFacts:
    """Facts of a codec, which is loaded once per process unless a file of its folder changes.

    Raises:
        UserError: as `load_codec`.
    """
    folder = Path(split_name(name)[0]).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return _facts(name, *((f.name, f.lstat().st_size, f.lstat().st_mtime_ns) for f in files))


@lru_cache(maxsize=8)
def _facts(name: str, *files: tuple[str, int, int]) -> CodecFacts:
    return load_codec(name).facts


def _model_type(source: str, local_files_only: bool) -> str | None:
    if (folder := Path(source)).is_dir():
        return read_model_type(folder)
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(source, local_files_only=local_files_only)[0].get(
        "model_type"
    )


def check_weights(
    name: str, weights: Mapping[str, Tensor], codebooks: Mapping[str, Tensor]
) -> None:
    """Check that a codec's weights are finite and trained.

    Args:
        name: The codec's name, for messages.
        weights: All weights by name, of encoder, codebooks and decoder.
        codebooks: Entries of each codebook, by name.

    Raises:
        UserError: if a codebook is all zero, or a weight is not finite.
    """
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"codec {name!r}: {key} has NaN or infinite values; download or train it again"
            )
    for key, entries in codebooks.items():
        if not entries.any():
            raise UserError(
                f"codec {name!r}: {key} is all zero, as in an untrained model; choose another"
            )


def first_codebooks(name: str, available: int, wanted: int | None) -> int:
    """Number of codebooks to use: `wanted`, or all if None.

    Raises:
        UserError: if `wanted` is 0 or more than are available.
    """
    if wanted is not None and not 1 <= wanted <= available:
        raise UserError(f"codec {name!r}: it has {available} codebooks; ask for that many or fewer")
    return wanted or available


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Context without autocast, TF32 and bfloat16 products, which Lightning may have enabled."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def codes_hash(weights: Mapping[str, Tensor], settings: dict[str, Any]) -> str:
    """SHA-256 of settings, names, shapes and float32 values, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, tensor in weights.items():
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]
