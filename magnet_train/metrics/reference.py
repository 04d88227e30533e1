"""Statistics of a reference set in a safetensors file, so that its audio is embedded only once.

Shapes: n windows of a clip, d dimensions, c classes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.folders import replacing, require_file
from magnet_train.metrics.fad import Moments

FORMAT = 1
_WRONG = (TypeError, ValueError, RuntimeError, AttributeError)
_PROTOCOL = ("embedder", "embedder_hash", "resampler", "windowing")


def hash_of_ids(ids: Iterable[str]) -> str:
    """16 hex digits that identify a set of ids in any order; ids must identify their audio."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ReferenceStatistics:
    """Moments of real clips, their protocol, and the features of each clip."""

    moments: Moments
    """Moments of all windows."""
    num_clips: int
    ids_hash: str
    """`hash_of_ids` of the clips, as in a record."""
    embedder: str
    """Id of the network."""
    embedder_hash: str
    """Hash of its weights."""
    resampler: str
    """Name of the resampler, for clips whose rate differs from the network's."""
    windowing: str
    """Length and hop of the windows, such as "1 s every 0.5 s"."""
    embeddings: Mapping[str, Tensor]
    """Embeddings `n d` by item id."""
    logits: Mapping[str, Tensor] = field(default_factory=dict)
    """Classifier outputs `n c` by item id, for KL; may be empty."""

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, Tensor],
        *,
        logits: Mapping[str, Tensor] | None = None,
        names: Iterable[str] | None = None,
        **protocol: str,
    ) -> "ReferenceStatistics":
        """Compute from windows `n d` by clip id, in any order.

        Args:
            embeddings: windows of each clip.
            logits: classifier outputs of each clip, `n c`, for KL.
            names: replace the ids in `ids_hash` if ids do not identify the audio.
            protocol: of the embedder (`Embedder.protocol`).

        Raises:
            UserError: for fewer than two windows in total, or an invalid embedding.
        """
        clips = dict(sorted(embeddings.items()))
        for key, windows in clips.items():
            if not torch.isfinite(windows).all():
                raise UserError(
                    f"reference clip {key}: its embedding is NaN or infinite; check the audio"
                )
        moments = Moments.of(torch.cat(list(clips.values()) or [torch.zeros(0, 1)]).cpu())
        moments.covariance("reference")
        return cls(
            moments,
            len(clips),
            hash_of_ids(clips if names is None else names),
            embeddings=clips,
            logits=dict(sorted((logits or {}).items())),
            **protocol,
        )

    def save(self, path: str | Path) -> None:
        """Write the file atomically: `mean`, `covariance`, concatenated windows, and metadata."""
        from safetensors.torch import save_file

        path = Path(path)
        about: dict[str, Any] = {
            "format": FORMAT,
            "num_windows": self.moments.count,
            "num_clips": self.num_clips,
        }
        about |= {name: getattr(self, name) for name in ("ids_hash", *_PROTOCOL)}
        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance("reference")}
        for kind in ("embeddings", "logits"):
            items: Mapping[str, Tensor] = getattr(self, kind)
            about[kind] = list(items)
            if items:
                tensors[kind] = torch.cat([x.detach().cpu() for x in items.values()])
                tensors[f"{kind}_windows"] = torch.tensor([len(x) for x in items.values()])
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(path) as temporary:
            save_file(contiguous, temporary, {"reference_statistics": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, **expected: str) -> "ReferenceStatistics":
        """Read a file written by `save`.

        Args:
            path: the file.
            expected: required values of embedder, embedder_hash, resampler and windowing.

        Raises:
            UserError: if the file is missing or damaged, or has another protocol.
        """
        from safetensors import SafetensorError, safe_open

        try:
            require_file(Path(path))
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {})["reference_statistics"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if about["format"] != FORMAT:
                raise UserError(
                    f"{path}: format {about['format']}, this version reads {FORMAT}; write it again"
                )
            moments = _moments(tensors, int(about["num_windows"]))
            others: dict[str, Any] = {name: str(about[name]) for name in ("ids_hash", *_PROTOCOL)}
            others |= {
                kind: _split(tensors, kind, about[kind]) for kind in ("embeddings", "logits")
            }
            if not others["embeddings"]:
                raise ValueError("no embeddings")
            read = cls(moments, int(about["num_clips"]), **others)
        except (OSError, SafetensorError, LookupError, ArithmeticError, *_WRONG) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{path}: missing, broken or not reference statistics ({reason}); write it again"
            ) from error
        for name, value in expected.items():
            if getattr(read, name) != value:
                raise UserError(
                    f"{path}: its {name} is {getattr(read, name)!r}, this run's {value!r}; "
                    "compute the reference again"
                )
        return read


def _moments(tensors: dict[str, Tensor], count: int) -> Moments:
    mean = tensors["mean"]
    covariance = tensors["covariance"]
    if count < 2 or mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{count} windows, mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}"
        )
    if not all(x.dtype == torch.float64 and torch.isfinite(x).all() for x in (mean, covariance)):
        raise ValueError("mean or covariance is not finite float64")
    return Moments(count, mean, covariance * (count - 1))


def _split(tensors: dict[str, Tensor], kind: str, ids: list[str]) -> dict[str, Tensor]:
    if not ids:
        return {}
    windows = tensors[f"{kind}_windows"].tolist()
    return dict(zip(ids, tensors[kind].split(windows), strict=True))
