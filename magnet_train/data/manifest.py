"""Audio files and their captions: the only reader of folders, sidecar files and manifests.

Folders are searched recursively; the caption of `a/b.wav` is in `a/b.txt` or `a/b.json`. A manifest
is JSONL, CSV or TSV with one row per clip. Input is untrusted, so sizes are limited. An error in
one file or row is stored with that clip (`Clip.error`); an error of the whole source is raised.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import stat
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError
from magnet_train.data.audio import SUFFIXES, read_tags

CAPTION_FIELDS = ("caption", "description", "prompt", "text")
"""Names of the caption field; the first non-empty one is used."""
PATH_FIELDS = ("path", "audio_filepath", "file_name")
"""Names of the field with the audio file's path."""
KNOWN_FIELDS = (*PATH_FIELDS, *CAPTION_FIELDS, "offset", "duration")
"""Case-insensitive field names."""
MANIFEST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
JAMENDO_COLUMNS = ("TRACK_ID", "ARTIST_ID", "ALBUM_ID", "path", "duration", "TAGS")
"""Columns of MTG-Jamendo's metadata; each tag has its own column, CATEGORY---NAME."""
JAMENDO_FIELDS = {"genre": "genre", "instrument": "instrument", "mood/theme": "moods"}
"""Fields for the tags of a category, with the names of audiocraft's music manifests."""
MISSING_WORDS = ("", "nan", "none", "null", "<na>", "n/a", "#n/a")
"""Texts, in lower case, that programs write for missing values."""
MAX_SIDECAR_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 1 << 30
MAX_DEPTH = 20
"""Maximum nesting of JSON."""
MAX_GZIP_RATIO = 100
"""Uncompressed over compressed size of a manifest; text reaches about 20, a gzip bomb 1,000."""
SEGMENT_TOLERANCE_S = 0.05
"""Segments that end within this distance of the end of the file, in seconds, end with it."""


@dataclass(frozen=True)
class Clip:
    """A recording, or a segment of it, with its caption and metadata."""

    path: Path
    name: str
    """Path as in the folder or manifest, in printable characters."""
    caption: str = ""
    """Empty if there is none."""
    fields: dict[str, Any] = field(default_factory=dict)
    """All other fields of the sidecar file or row; a musical `key` is renamed to `music_key`."""
    offset_s: float = 0.0
    """Start of the segment in the file, in seconds."""
    duration_s: float | None = None
    """Length of the segment, in seconds; None = up to the end of the file."""
    error: str = ""
    """Why the clip cannot be used, in one line; empty if it can."""

    @property
    def id(self) -> str:
        """The name without its audio suffix."""
        name = Path(self.name)
        return (name.with_suffix("") if name.suffix.lower() in SUFFIXES else name).as_posix()

    def segment(self, file_s: float) -> tuple[float, float]:
        """Start and length of the clip in a file of `file_s` seconds, in seconds.

        Raises:
            UserError: if it starts at or after the end of the file.
        """
        if self.offset_s >= file_s:
            raise UserError(
                f"{self.name}: offset {self.offset_s:g} s is beyond its {file_s:.2f} s; correct it"
            )
        rest = file_s - self.offset_s
        if self.duration_s is None or self.duration_s > rest - SEGMENT_TOLERANCE_S:
            return self.offset_s, rest
        return self.offset_s, self.duration_s


def find_clips(source: Path) -> list[Clip]:
    """The clips of a folder, sorted by path, or of a manifest, in its order.

    Symbolic links to folders are followed, each folder is listed once, and hidden files and folders
    are ignored. A manifest has columns `path` (or `audio_filepath`, `file_name`; relative to the
    manifest) and one of `CAPTION_FIELDS`; a row without a caption uses the sidecar file of its
    audio. `offset` and `duration`, in seconds, select a segment, as in NeMo's manifests.
    `Clip.caption` is empty if there is no caption.

    Raises:
        UserError: if the folder or manifest is missing or unreadable, or has no audio.
    """
    source = source.expanduser()
    if source.is_dir():
        clips = _clips_in_folder(source)
    elif is_manifest(source):
        clips = _clips_in_manifest(source)
    elif source.exists():
        raise UserError(
            f"{source}: give a folder of audio, or a manifest ({', '.join(MANIFEST_SUFFIXES)})"
        )
    else:
        raise UserError(f"{source}: no such folder or manifest")
    if not clips:
        raise UserError(f"{source}: no audio files ({', '.join(SUFFIXES)}) in it")
    return clips


def is_manifest(path: Path) -> bool:
    """Whether a file has a manifest's suffix, optionally followed by `.gz`.

    >>> is_manifest(Path("data.jsonl.gz")), is_manifest(Path("prompts.txt"))
    (True, False)
    """
    return path.name.lower().removesuffix(".gz").endswith(MANIFEST_SUFFIXES)


def read_prompts(file: Path) -> list[str]:
    """Captions of a text file with one per line, or of a manifest, whose rows need no path.

    Raises:
        UserError: if the file cannot be read, has no caption, or a row has none.
    """
    if is_manifest(file):
        captions = []
        for line, row in read_rows(file):
            caption = split_caption(row, f"{file}, line {line}")[0]
            if not caption:
                raise UserError(
                    f"{file}, line {line}: no caption; give one of {', '.join(CAPTION_FIELDS)}"
                )
            captions.append(caption)
    else:
        lines = re.split(r"\r\n|\r|\n", _read_text(file, MAX_MANIFEST_BYTES))
        captions = [_one_line(line) for line in lines if line.strip()]
        _check_not_a_manifest(file, captions)
    if not captions:
        raise UserError(f"{file}: no prompt in it; write one per line")
    return captions


def _check_not_a_manifest(file: Path, lines: Sequence[str]) -> None:
    """Refuse a manifest whose name is that of a text: its lines are no prompts."""
    first = lines[0] if lines else ""
    columns = {name.strip(' "').lower() for name in first.split(",")}
    is_table = len(columns) > 1 and all(map(str.isidentifier, columns))
    kind = "JSONL" if re.match(r'\{\s*"', first) else "CSV"
    if kind == "JSONL" or (is_table and columns & {*CAPTION_FIELDS}):
        raise UserError(
            f"{file}: its first line is that of a {kind} file; name it .{kind.lower()}, or write "
            "one prompt per line"
        )


# --- captions -------------------------------------------------------------------------------------


def read_sidecar(path: Path) -> tuple[str, dict[str, Any]]:
    """Caption and further fields of the `.json` and `.txt` next to an audio file.

    The `.json` has precedence.

    Raises:
        UserError: if a file is unreadable, not UTF-8 or too large, or the `.json` is not an object.
    """
    return _Sidecars().read(path)


class _Sidecars:
    """Reads sidecar files with suffixes in any case; lists each folder once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, str]] = {}

    def add(self, folder: Path, names: list[str]) -> None:
        """Register the `.json` and `.txt` among the file names of a folder."""
        stems = ((name, Path(name)) for name in names)
        self._listed[folder] = {
            path.stem + path.suffix.lower(): name
            for name, path in stems
            if path.suffix.lower() in (".json", ".txt")
        }

    def read(self, path: Path) -> tuple[str, dict[str, Any]]:
        """As `read_sidecar`."""
        if path.parent not in self._listed:
            try:
                self.add(path.parent, os.listdir(path.parent))
            except OSError:
                self.add(path.parent, [])
        there = self._listed[path.parent]
        caption, fields = "", {}
        if (name := there.get(path.stem + ".json")) is not None:
            caption, fields = _read_json_sidecar(path.with_name(name))
        if not caption and (name := there.get(path.stem + ".txt")) is not None:
            caption = _one_line(_read_text(path.with_name(name), MAX_SIDECAR_BYTES))
        return caption, fields


def _read_json_sidecar(file: Path) -> tuple[str, dict[str, Any]]:
    return split_caption(_parse_json(_read_text(file, MAX_SIDECAR_BYTES), str(file)), str(file))


def split_caption(row: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Caption and all other fields with a value.

    >>> split_caption({"caption": None, "text": "a slow\\n waltz", "key": "A", "bpm": "nan"}, "")
    ('a slow waltz', {'music_key': 'A'})
    """
    try:
        fields = _drop_missing(dict(row))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    name = next((name for name in CAPTION_FIELDS if name in fields), None)
    caption = "" if name is None else fields.pop(name)
    if not isinstance(caption, str):
        raise UserError(f"{where}: {name} is a {type(caption).__name__}; give a string")
    fields.pop("path", None)
    if "key" in fields:  # the musical key; in shards `key` is the item's id
        fields["music_key"] = fields.pop("key")
    return _one_line(caption), fields


def _drop_missing(value: Any, depth: int = 0) -> Any:
    """A copy of a JSON value without missing entries in lists and objects."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        there = {_printable(k): v for k, v in value.items() if not _is_missing(v)}
        return {k: _drop_missing(v, depth + 1) for k, v in there.items()}
    if isinstance(value, list):
        return [_drop_missing(v, depth + 1) for v in value if not _is_missing(v)]
    return _printable(value) if isinstance(value, str) else value


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in MISSING_WORDS
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _printable(text: str) -> str:
    """The text with ? for characters that UTF-8 cannot encode (e.g. lone surrogates)."""
    return text.encode(errors="replace").decode()


def _one_line(text: str) -> str:
    """The text with single spaces; empty for a missing value."""
    return "" if _is_missing(text) else " ".join(text.split())


def with_fallback_captions(clips: Sequence[Clip], names: bool) -> list[Clip]:
    """The clips; those without a caption get one from their file's tags, or its name if `names`.

    A tag's caption is title, genre and comment (ID3, Vorbis comments, RIFF INFO), a name's the
    words of the file name without a track number. `caption_from` in the fields says which.
    """
    return [clip if clip.caption or clip.error else _captioned(clip, names) for clip in clips]


def _captioned(clip: Clip, names: bool) -> Clip:
    found = {"tags": _one_line(_printable(", ".join(read_tags(clip.path))))}
    if names:
        words = re.sub(r"[\W_]+", " ", Path(clip.id).name).strip()
        found["name"] = re.sub(r"^\d+ (?=\D)", "", words)
    for origin, caption in found.items():
        if re.search(r"[^\W\d]", caption):  # has a letter
            fields = clip.fields | {"caption_from": origin}
            return replace(clip, caption=caption, fields=fields)
    return clip


# --- folders --------------------------------------------------------------------------------------


def _clips_in_folder(source: Path) -> list[Clip]:
    sidecars = _Sidecars()
    audio: list[Path] = []
    clips: list[Clip] = []
    for folder, names, error in _walk(source):
        if error is not None:
            reason = f"{folder}: cannot be listed ({error.strerror})"
            clips.append(Clip(folder, _name(folder, source), error=reason))
        sidecars.add(folder, names)
        audio += [folder / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    clips += [_with_sidecar(path, _name(path, source), sidecars) for path in audio]
    return sorted(clips, key=lambda clip: clip.path)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], OSError | None]]:
    """Each folder once with its file names, folders before links, without hidden ones."""
    seen: set[tuple[int, int]] = set()
    queue = deque([root])
    while queue:
        folder = queue.popleft()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = _entries(folder)
        except OSError as error:
            yield folder, [], error
            continue
        folders = [entry for entry in entries if os.path.isdir(entry)]
        queue.extendleft(
            folder / entry.name for entry in reversed(folders) if not entry.is_symlink()
        )
        queue.extend(folder / entry.name for entry in folders if entry.is_symlink())
        yield folder, [entry.name for entry in entries if entry not in folders], None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Files and folders in a folder, sorted by name, without hidden ones."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return sorted(entries, key=lambda entry: entry.name)


def _name(path: Path, source: Path) -> str:
    return _printable(str(path.relative_to(source)))


def _with_sidecar(path: Path, name: str, sidecars: _Sidecars) -> Clip:
    try:
        caption, fields = sidecars.read(path)
    except UserError as error:
        return Clip(path, name, error=str(error))
    return Clip(path, name, caption, fields)


# --- manifests ------------------------------------------------------------------------------------


def read_rows(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL, CSV or TSV file, optionally `.gz`, with their line numbers.

    Raises:
        UserError: if the file or a row is unreadable; the message names the line.
    """
    text = _read_text(manifest, MAX_MANIFEST_BYTES)
    kind = Path(manifest.name.lower().removesuffix(".gz")).suffix
    if kind in (".csv", ".tsv"):
        yield from _read_table(text, manifest, "\t" if kind == ".tsv" else ",")
        return
    if text.lstrip().startswith("["):
        raise UserError(f"{manifest}: a JSON array; write one object per line (JSONL)")
    lines = text.split("\n")  # splitlines would split at U+2028, which JSON strings may contain
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse_json(line, f"{manifest}, line {number}")


def _read_table(text: str, manifest: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    columns: list[str] = []
    while True:
        number = reader.line_num + 1  # first line of the row
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{manifest}, line {number}: {error}; close each quote, and double quotes in text"
            ) from error
        if not row:
            continue
        if not columns:
            columns = [_known_name(name) for name in row]
            if len(set(columns)) < len(columns):
                raise UserError(
                    f"{manifest}, line {number}: two columns of the same name; rename one"
                )
        elif tuple(columns) == JAMENDO_COLUMNS:
            yield number, _jamendo_row(row, manifest.parent)
        elif len(row) > len(columns):
            raise UserError(
                f"{manifest}, line {number}: more columns than line 1; quote text with commas"
            )
        else:
            yield number, dict(zip(columns, row, strict=False))


def _jamendo_row(row: list[str], folder: Path) -> dict[str, Any]:
    """Path, caption and fields of a row of MTG-Jamendo's metadata.

    The caption lists the tags. The length is that of the file, which is only rounded in the row,
    and `.low.mp3`, the smaller version of the audio, is used where it is the one there is.
    """
    track, artist, album, path, _, *tags = row + [""] * (len(JAMENDO_COLUMNS) - len(row))
    found: dict[str, list[str]] = {}
    for tag in tags:
        category, _, name = tag.partition("---")
        if name and category in JAMENDO_FIELDS:
            found.setdefault(JAMENDO_FIELDS[category], []).append(name)
    low = f"{path.removesuffix('.mp3')}.low.mp3"
    is_low = os.path.exists(folder / low) and not os.path.exists(folder / path)
    parts = [f"{name}: {', '.join(found[name])}" for name in sorted(found)]
    about = {"track_id": track, "artist_id": artist, "album_id": album}
    return {"path": low if is_low else path, "caption": ". ".join(parts)} | about | found


def _clips_in_manifest(manifest: Path) -> list[Clip]:
    sidecars = _Sidecars()
    return [_clip_from_row(row, manifest, line, sidecars) for line, row in read_rows(manifest)]


def _clip_from_row(row: dict[str, Any], manifest: Path, line: int, sidecars: _Sidecars) -> Clip:
    where = f"{manifest}, line {line}"
    column = next(
        (name for name in PATH_FIELDS if isinstance(row.get(name), str) and row[name].strip()), None
    )
    if column is None:
        raise UserError(f"{where}: no path; name the column {' or '.join(PATH_FIELDS)}")
    name = row.pop(column)
    printable = _printable(name)
    path = manifest.parent / name  # absolute paths stay absolute
    try:
        if not _can_be_a_path(name):
            raise UserError(f"{where}: {printable!r} cannot be the path of a file")
        caption, fields = split_caption(row, where)
        offset_s, duration_s = _pop_segment(fields, where)
        if not caption:
            caption, beside = sidecars.read(path)
            fields |= beside
    except UserError as error:
        return Clip(path, printable, error=str(error))
    return Clip(path, printable, caption, fields, offset_s, duration_s)


def _can_be_a_path(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name) and Path(name).name != ""
    except UnicodeEncodeError:
        return False


def _known_name(column: str) -> str:
    """The column's name; known names are case-insensitive."""
    name = column.strip()
    return name.lower() if name.lower() in KNOWN_FIELDS else name


def _pop_segment(fields: dict[str, Any], where: str) -> tuple[float, float | None]:
    """Remove `offset` and `duration`, in seconds, from the fields of a row."""
    offset, duration = fields.pop("offset", 0.0), fields.pop("duration", None)
    try:
        if isinstance(offset, bool) or isinstance(duration, bool):
            raise TypeError
        offset_s = float(offset)
        duration_s = None if duration is None else float(duration)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: offset={str(offset)[:40]}, duration={str(duration)[:40]}: give seconds"
        ) from error
    if not (0 <= offset_s < math.inf and (duration_s is None or 0 < duration_s < math.inf)):
        raise UserError(
            f"{where}: offset={offset_s:g} must be at least 0 s and duration={duration_s} above 0 s"
        )
    return offset_s, duration_s


# --- files ----------------------------------------------------------------------------------------


def _read_text(file: Path, max_bytes: int) -> str:
    """Read UTF-8 with or without a byte order mark; `.gz` files are decompressed.

    Raises:
        UserError: if it is not a regular file, unreadable, not UTF-8, or above `max_bytes`.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a named pipe would block
            raise UserError(f"{file}: not a regular file")
        is_gzip = file.suffix.lower() == ".gz"
        limit = (
            min(max_bytes, MAX_SIDECAR_BYTES + MAX_GZIP_RATIO * about.st_size)
            if is_gzip
            else max_bytes
        )
        with gzip.open(file) if is_gzip else file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{file}: has more than {limit:,} bytes; split it")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: unreadable ({getattr(error, 'strerror', None) or error})"
        ) from error


def _parse_json(text: str, where: str) -> dict[str, Any]:
    """An object without missing values."""
    try:
        value = json.loads(text, parse_constant=lambda name: None, object_pairs_hook=_json_object)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: not JSON ({reason}); repair it") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: is a {type(value).__name__}; give an object with a "caption"')
    return value


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs that have a value; raises ValueError for two of one name, which json allows."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if _is_missing(value):
            continue
        if _known_name(name) in found:
            raise ValueError(f"two values for {name!r}; remove one")
        found[_known_name(name)] = value
    return found
