"""Inputs of `evaluate`: folders of clips, captions, prompts and the reference.

The id of a clip is its path in its folder without suffix; it pairs generated and real clips.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from magnet_train.common.audio_files import slug
from magnet_train.common.errors import UserError
from magnet_train.data.audio import duration_s
from magnet_train.data.manifest import Clip, find_clips, is_manifest, read_prompts
from magnet_train.metrics.embedders import Embedder
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet, load_reference

Clips = dict[str, Clip]
"""Clips by id."""


def list_clips(folder: Path) -> Clips:
    """Audio files in a folder and its subfolders, with captions, by id, sorted.

    Raises:
        UserError: if there is no file, two have the same id, or a caption is unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return _by_id(find_clips(folder))


def _by_id(found: Iterable[Clip]) -> Clips:
    clips: Clips = {}
    for clip in found:
        if clip.error:
            raise UserError(clip.error)
        if clip.id in clips:
            raise UserError(
                f"{clips[clip.id].path} and {clip.path}: two clips named {clip.id}; keep one of "
                "them"
            )
        clips[clip.id] = clip
    return clips


def parse_systems(generated: Sequence[str]) -> dict[str, Path]:
    """Parse `--generated`: FOLDER or NAME=FOLDER each, to folders by name.

    An entry is split at its first "=" only if the part before it is a plain name and no such folder
    exists, so that paths may contain "=".

    Raises:
        UserError: if two systems have the same name.
    """
    systems: dict[str, Path] = {}
    for entry in generated:
        name, separator, folder = entry.partition("=")
        is_named = separator and name and "/" not in name and not Path(entry).expanduser().exists()
        path = Path(folder if is_named else entry).expanduser()
        if not is_named:
            name = path.resolve().name
        if name == "reference":
            raise UserError(f"--generated {entry}: the name reference is taken; write NAME={path}")
        if name in systems:
            raise UserError(f"--generated {entry}: a second system named {name}; write NAME={path}")
        systems[name] = path
    return systems


def load_captions(file: Path | None, clips: Clips) -> dict[str, str]:
    """Captions by clip id, from a manifest or sidecar files; clips without caption are omitted.

    Raises:
        UserError: if a manifest does not have exactly the captions of the clips.
    """
    if file is None:
        return {key: clip.caption for key, clip in clips.items() if clip.caption}
    found = _load_manifest(file)
    missing = [key for key in clips if key not in found]
    unused = [key for key in found if key not in clips]
    if missing or unused:
        which = f"{missing[0]} has none" if missing else f"{unused[0]} is not a clip"
        raise UserError(
            f"{file}: {len(found)} captions for {len(clips)} clips; {which}: give the clips' paths "
            "within their folder"
        )
    return {key: found[key] for key in clips}


def _load_manifest(file: Path) -> dict[str, str]:
    """Captions by id, from JSONL, CSV or TSV.

    Raises:
        UserError: if a row has no caption, an id is repeated, or a path is outside of the folder.
    """
    clips = find_clips(file)
    for clip in clips:
        path = Path(clip.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file}: {path} is outside of the folder; give paths relative to it")
        if not clip.error and not clip.caption:
            raise UserError(f"{file}: {path} has no caption; write one, or remove the row")
    return {key: clip.caption for key, clip in _by_id(clips).items()}


def load_prompts(file: Path) -> dict[str, str]:
    """Captions to generate for, by the id of the future clip.

    Raises:
        UserError: if the file is unreadable or empty, a row has no caption, or a caption is
            repeated.
    """
    if is_manifest(file):
        return _load_manifest(file)
    prompts = read_prompts(file)
    if len(set(prompts)) < len(prompts):
        raise UserError(
            f"--prompts {file}: a line is repeated and would give the same clip; remove it"
        )
    return {slug(prompt): prompt for prompt in prompts}


def saved_statistics(reference: str) -> list[Path]:
    """Files of saved statistics given by `--reference`; none for a folder of audio."""
    path = Path(reference).expanduser()
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


@dataclass
class Reference:
    """The real clips, as audio or saved statistics; empty without a reference."""

    clips: Clips = field(default_factory=dict)
    """Audio files; empty for saved statistics."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Lengths of the clips; generated clips of the same id are truncated to them."""
    statistics: dict[str, ReferenceStatistics] = field(default_factory=dict)
    """Statistics by embedder; for audio, after embedding."""

    @classmethod
    def open(cls, reference: str | None, embedders: Iterable[Embedder]) -> "Reference":
        """List the audio, or load saved statistics.

        Raises:
            UserError: if there is neither, or the statistics are for other embedders.
        """
        if reference is None:
            return cls()
        path = Path(reference).expanduser()
        if not saved_statistics(reference):
            clips = list_clips(path)
            return cls(clips, {key: duration_s(clip.path) for key, clip in clips.items()})
        statistics = {}
        for embedder in embedders:
            file = path if path.is_file() else path / f"{embedder.name}.safetensors"
            if not file.is_file():
                raise UserError(
                    f"{file}: not found; also save the reference with metrics of {embedder.name}"
                )
            statistics[embedder.name] = load_reference(file, embedder)
        return cls(statistics=statistics)

    def compute_statistics(self, features: Mapping[str, FeatureSet]) -> None:
        """Compute the statistics from the features of all clips.

        Raises:
            UserError: if there are too few windows.
        """
        # Ids are not enough: another reference may have the same file names.
        names = []
        for key, clip in self.clips.items():
            names.append(f"{key} {hashlib.sha256(clip.path.read_bytes()).hexdigest()}")
        self.statistics = {name: part.statistics(names=names) for name, part in features.items()}

    def paired_ids(self, embedder: str) -> set[str]:
        """Ids of the real clips that KL can pair with generated ones."""
        return set(self.clips) or set(self.statistics[embedder].logits)
