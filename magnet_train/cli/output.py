"""Shared by `generate` and `edit`: options, best-of-n, audio files and their JSON."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from magnet_train.common.errors import UserError
from magnet_train.common.folders import write_json, written
from magnet_train.common.ranges import check_values

if TYPE_CHECKING:
    from torch import Tensor

    from magnet_train.decoding.decode import DecodingConfig
    from magnet_train.generator import Generator
    from magnet_train.release import SavedModel

MAX_SEED = 2**63 - 1
MAX_DURATION_S = 3600.0
MAX_PLOT_S = 180.0
"""Length of the longest clip that gets a plot, in seconds."""
NOT_IN_RECIPE = {
    "out",
    "plots",
    "batch_size",
    "device",
    "compiled",
    "variations",
    "best_of",
    "judge",
    "reference",
    "prompts_file",
    "unconditional",
}
"""Options that do not change a clip, and are not in its JSON."""


@dataclass(frozen=True)
class OutputOptions:
    """Options of output files."""

    out: Path = Path("generated")
    """Folder for the audio files."""
    checkpoint: str = "demo"
    """Release folder, hub id, checkpoint, run folder, or "demo" for the bundled model."""
    lora: list[str] = field(default_factory=list)
    """LoRA adapters on the model, FOLDER or FOLDER:STRENGTH each (as in a:0.8 b:0.4), added up."""
    seed: int = 0
    """Seed; variation i uses seed + i. A repeated prompt continues with the next seeds."""
    variations: int = 1
    """Files per prompt."""
    best_of: int = 1
    """Number of candidates per file, with different seeds; only the best by --judge is kept."""
    judge: str = "text/musicnn"
    """Metric of --best_of: fad/EMBEDDER, text/EMBEDDER, or music/key_rank, beat, scale_fit or
    periodicity.
    """
    reference: str | None = None
    """Folder of real audio, or statistics saved by `evaluate`, for --judge fad/EMBEDDER."""
    format: Literal["wav", "flac"] = "wav"
    """Format of the audio files."""
    plots: bool = True
    """Write a spectrogram with the order of unmasking next to each file of up to 3 minutes."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 …; auto uses a GPU if there is one."""
    precision: Literal["32", "bf16"] = "32"
    """Precision of the network; bf16 is faster on GPUs and gives different audio."""
    compiled: bool = False
    """Compile the network, for many files on a GPU. The start then takes minutes."""

    def __post_init__(self) -> None:
        check_values(
            self, "--", seed=f"[0, {MAX_SEED}]", variations="[1, 1000000]", best_of="[1, 10000]"
        )
        check_device(self.device)


def check_device(name: str) -> None:
    """Raise a UserError if `--device` does not name a kind of device."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")


def find_device(name: str) -> str:
    """The device that `--device` names.

    Raises:
        UserError: if this machine does not have it.
    """
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    index = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and index >= count:
        raise UserError(
            f"--device {name}: this machine has {count} CUDA devices; choose another, or cpu"
        )
    return name


def check_model(options: OutputOptions, decoding: dict[str, Any]) -> "SavedModel":
    """Open the model of --checkpoint without its weights, and check the options.

    Args:
        options: the options.
        decoding: replaces decoding settings of the model.

    Raises:
        UserError: if the model, device, a decoding setting or the rescorer is not usable.
    """
    from magnet_train.decoding.load_rescorer import check_rescorer
    from magnet_train.release import SavedModel

    saved = SavedModel.open(options.checkpoint).with_adapters(options.lora)
    find_device(options.device)
    settings = saved.decoding.updated(decoding)
    if settings.rescorer is not None:
        check_rescorer(settings.rescorer, saved.codec)
    return replace(saved, decoding=settings)


def load_generator(options: OutputOptions) -> "Generator":
    """Load the model of --checkpoint."""
    import torch

    from magnet_train.common.products import choose_products
    from magnet_train.generator import load

    choose_products()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    device = find_device(options.device)
    return load(options.checkpoint, device, dtype, options.compiled, options.lora)


class Chooser:
    """Chooses the best candidate for a file."""

    def __init__(self, options: OutputOptions, prompts: Sequence[str]):
        """Load the judge.

        Raises:
            UserError: if it cannot be loaded, or used for these prompts.
        """
        self.options = options
        if options.best_of > 1:
            from magnet_train.evaluation.judge import check_judge, load_judge

            check_judge(options.judge, options.reference, prompts)
            device = find_device(options.device)
            self._judge = load_judge(options.judge, options.reference, device)

    def __call__(
        self, wavs: "Sequence[Tensor]", sample_rate: int, caption: str
    ) -> tuple[int, dict[str, Any]]:
        """Index of the best of `wavs`, `channels t` each, and fields for its JSON."""
        if len(wavs) == 1:
            return 0, {}
        from magnet_train.evaluation.judge import best_of
        from magnet_train.evaluation.scorer import AudioClip

        options = self.options
        clips = [AudioClip(str(i), wav.cpu(), sample_rate) for i, wav in enumerate(wavs)]
        index, value = best_of(clips, caption, self._judge)
        return index, {"best_of": len(wavs), "judge": options.judge, "judged": round(value, 4)}


def recipe(options: OutputOptions, settings: "DecodingConfig", **specific: Any) -> dict[str, Any]:
    """Options to reproduce a clip, for its JSON; `specific` has those of this clip only."""
    values = {k: v for k, v in asdict(options).items() if k not in NOT_IN_RECIPE}
    values = values | specific | {"decoding": asdict(settings)}
    return json.loads(json.dumps({k: v for k, v in values.items() if v is not None}, default=str))


def write_exact(
    path: Path, blocks: "Iterable[Tensor]", sample_rate: int, about: dict[str, Any]
) -> None:
    """Write consecutive blocks `channels t` unchanged as 24-bit audio, and `about` as JSON.

    Samples of a 16- or 24-bit recording stay exact.

    Raises:
        UserError: if the folder cannot be written.
    """
    import soundfile

    from magnet_train.common.audio_files import clipped_share

    clipped, total, file = 0.0, 0, None
    with written(path) as temporary:
        for block in blocks:
            wav = block.T.double().numpy()
            if file is None:
                kind = path.suffix[1:].upper()
                shape = sample_rate, wav.shape[1]
                file = soundfile.SoundFile(temporary, "w", *shape, "PCM_24", format=kind)
            clipped += clipped_share(wav) * len(wav)
            total += len(wav)
            file.write((wav * 2**23).round().clip(-(2**23), 2**23 - 1).astype("int32") * 256)
        if file is not None:
            file.close()
        about = about | {
            "duration_s": total / sample_rate,
            "clipped_share": round(clipped / max(total, 1), 6),
        }
        write_json(path.with_suffix(".json"), about)
