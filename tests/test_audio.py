"""A file's length equals its decoded length, even if its header is wrong or missing."""

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import write_clip
from helpers_errors import refusal

from magnet_train.common.errors import UserError
from magnet_train.data.audio import duration_s, read_audio, split_mp3, split_ogg
from magnet_train.data.manifest import find_clips

RATE = 16_000
ID3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
"""An empty tag."""
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def clip(folder: Path, suffix: str, seconds: float = 1.0, **kind: Any) -> Path:
    return write_clip(folder / f"{seconds}{suffix}", seconds, None, RATE, **kind)


def length_s(path: Path) -> float:
    """Decoded length, which must equal the planned length."""
    read = read_audio(path, RATE, 1).shape[1] / RATE
    assert read == pytest.approx(duration_s(path), abs=1 / RATE)
    return read


def without_count(content: bytes) -> bytes:
    """An MP3 without its first frame, which contains the number of frames."""
    (found,) = split_mp3(content)
    assert b"Info" in found[:200] or b"Xing" in found[:200]
    return found[found.index(found[:2], 4) :]


def resized(content: bytes, riff: int, data: int | None = None) -> bytes:
    """A WAV whose header has other sizes, in bytes."""
    found = bytearray(content)
    found[4:8] = struct.pack("<I", riff)
    if data is not None:
        at = content.index(b"data") + 4
        found[at : at + 4] = struct.pack("<I", data)
    return bytes(found)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".mp3", {}),
        (".mp3", {"bitrate_mode": "VARIABLE"}),
        (".ogg", {}),
        (".opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
    ids=str,
)
def test_files_joined_end_to_end_are_read_to_their_end(suffix: str, kind: Any, tmp_path: Path):
    parts = [clip(tmp_path, suffix, seconds, **kind) for seconds in (1.0, 0.5)]
    (tmp_path / f"joined{suffix}").write_bytes(b"".join(p.read_bytes() for p in parts))
    lengths = [length_s(part) for part in parts]
    assert length_s(tmp_path / f"joined{suffix}") == pytest.approx(sum(lengths), abs=2 / RATE)
    wav = read_audio(tmp_path / f"joined{suffix}", RATE, 1)
    second = read_audio(parts[1], RATE, 1)
    assert np.allclose(wav[:, -second.shape[1] :], second, atol=1e-4)


@pytest.mark.parametrize("counted", [(True, False), (False, True), (False, False)], ids=str)
def test_joined_mp3_files_of_which_not_all_have_a_count(counted: tuple[bool, ...], tmp_path: Path):
    whole = clip(tmp_path, ".mp3", 2.0).read_bytes()
    joined = b"".join(whole if count else without_count(whole) for count in counted)
    (tmp_path / "joined.mp3").write_bytes(joined)
    assert length_s(tmp_path / "joined.mp3") == pytest.approx(4.0, abs=0.3)


def test_joined_flac_files_are_refused(tmp_path: Path):
    one = clip(tmp_path, ".flac")
    assert length_s(one) == 1.0
    for tag in (b"", ID3):
        (tmp_path / "joined.flac").write_bytes(tag + 2 * one.read_bytes())
        with pytest.raises(UserError, match="joined from several FLAC files"):
            read_audio(tmp_path / "joined.flac", RATE, 1)


def test_streams_of_other_rates_are_no_one_recording(tmp_path: Path):
    one = clip(tmp_path, ".ogg").read_bytes()
    other = write_clip(tmp_path / "other.ogg", 1, None, 44_100).read_bytes()
    (tmp_path / "joined.ogg").write_bytes(one + other)
    assert "different rates or channels; split it" in refusal(duration_s, tmp_path / "joined.ogg")


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_a_count_is_read_to_its_end(mode: str, tmp_path: Path):
    path = clip(tmp_path, ".mp3", 2.0, bitrate_mode=mode)
    path.write_bytes(without_count(path.read_bytes()))
    assert length_s(path) == pytest.approx(2.0, abs=0.15)  # with the encoder's padding


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        (lambda x: x[: len(x) // 2], 1.0),
        (lambda x: x + bytes(4096), 2.0),
        (lambda x: bytes(4096) + x, 2.0),
        (lambda x: b"ID3\4\0\0\0\0\0\x16TIT2\0\0\0\x0c\0\0\3Xing + Info" + x, 2.0),
        (lambda x: x + b"APETAGEX" + bytes(2000) + b"TAG" + bytes(125), 2.0),
    ],
    ids=["cut", "zeros behind", "zeros in front", "a title like a count", "tags behind"],
)
def test_an_mp3_without_a_count_among_other_bytes(
    change: Callable[[bytes], bytes], seconds: float, tmp_path: Path
):
    path = clip(tmp_path, ".mp3", 2.0)
    path.write_bytes(change(without_count(path.read_bytes())))
    assert length_s(path) == pytest.approx(seconds, abs=0.15)


def test_an_mp3_that_ends_within_its_count_is_refused(tmp_path: Path):
    (tmp_path / "a.mp3").write_bytes(b"\xff\xf3\x88\xc4" + bytes(9) + b"Xing")
    assert "a.mp3" in refusal(duration_s, tmp_path / "a.mp3")


@pytest.mark.parametrize(
    ("suffix", "named"),
    [(".mp3", ".wav"), (".mp3", ".flac"), (".wav", ".mp3"), (".flac", ".mp3"), (".ogg", ".mp3")],
)
def test_the_content_decides_not_the_name(suffix: str, named: str, tmp_path: Path):
    path = clip(tmp_path, suffix, 2.0)
    content = path.read_bytes()
    content = without_count(content) if suffix == ".mp3" else content
    (tmp_path / f"renamed{named}").write_bytes(content)
    assert length_s(tmp_path / f"renamed{named}") == pytest.approx(2.0, abs=0.15)
    if suffix in (".mp3", ".flac"):
        (tmp_path / f"tagged{named}").write_bytes(ID3 + content)
        assert length_s(tmp_path / f"tagged{named}") == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".aifc", {"format": "AIFF"}),
        (".au", {}),
        (".caf", {}),
        (".w64", {}),
        (".rf64", {"format": "RF64"}),
        (".wave", {"format": "WAV"}),
    ],
)
def test_formats_that_soundfile_reads_are_found(suffix: str, kind: Any, tmp_path: Path):
    path = clip(tmp_path, suffix, 1.5, **kind)
    assert [found.path for found in find_clips(tmp_path)] == [path]
    assert length_s(path) == pytest.approx(1.5, abs=1 / RATE)


def test_an_ogg_that_was_cut_is_called_truncated(tmp_path: Path):
    path = clip(tmp_path, ".ogg")
    content = path.read_bytes()
    assert split_ogg(content, path) == [content]
    for end in (len(content) - 1, len(content) // 2):
        path.write_bytes(content[:end])
        assert "truncated" in refusal(read_audio, path, RATE, 1)
    path.write_bytes(content[: content.rindex(b"OggS")])  # at a page's border
    assert "truncated" in refusal(read_audio, path, RATE, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: resized(x, len(x)),
        lambda x: resized(x, 0, 0),
        lambda x: resized(x, 0xFFFFFFFF, 0xFFFFFFFF),
        lambda x: resized(x, 2_000_000_036, 2_000_000_000),
        lambda x: resized(x, len(x) - 8, len(x) - 8),
        lambda x: x + b"LIST\4\0\0\0abcd",
    ],
    ids=["own head", "zero", "unknown", "placeholder", "twice", "more behind"],
)
def test_a_wav_with_wrong_sizes_is_read_to_its_end(
    change: Callable[[bytes], bytes], tmp_path: Path
):
    path = clip(tmp_path, ".wav", subtype="PCM_16")
    path.write_bytes(change(path.read_bytes()))
    assert read_audio(path, RATE, 1).shape[1] == pytest.approx(RATE, abs=8)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ({"subtype": "PCM_16"}, 2000),
        ({"subtype": "GSM610"}, 2),
        ({"subtype": "IMA_ADPCM"}, 1),
        ({"subtype": "MS_ADPCM"}, 1),
        ({"subtype": "PCM_24", "format": "RF64"}, 2000),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value),
)
def test_a_wav_that_promises_more_than_it_has_is_truncated(
    kind: dict[str, str], missing: int, tmp_path: Path
):
    path = clip(tmp_path, ".wav", **kind)
    content = path.read_bytes()
    assert length_s(path) == pytest.approx(1.0, abs=0.04)  # block codings pad their last block
    path.write_bytes(content[:-missing])
    with pytest.raises(UserError, match=r"truncated after .* copy it again"):
        read_audio(path, RATE, 1)
    at = content.index(b"data")
    extra = b"LIST" + struct.pack("<I", 100_000) + bytes(100_000)
    path.write_bytes(content[:at] + extra + content[at:-missing])
    with pytest.raises(UserError, match=r"truncated after .* copy it again"):
        read_audio(path, RATE, 1)


@pytest.mark.parametrize(("suffix", "unknown"), [(".au", slice(8, 12)), (".w64", slice(16, 24))])
def test_an_au_or_w64_that_was_cut_is_truncated(suffix: str, unknown: slice, tmp_path: Path):
    path = clip(tmp_path, suffix, subtype="PCM_16")
    content = path.read_bytes()
    path.write_bytes(content[:-RATE])
    assert "truncated after" in refusal(duration_s, path)
    endless = bytearray(content)
    endless[unknown] = b"\xff" * (unknown.stop - unknown.start)
    path.write_bytes(endless)
    assert read_audio(path, RATE, 1).shape[1] == RATE


@pytest.mark.parametrize("size", [0, (1 << 64) - 1])
def test_an_rf64_whose_size_was_never_filled_in_is_read_to_its_end(size: int, tmp_path: Path):
    path = clip(tmp_path, ".wav", subtype="PCM_16", format="RF64")
    content = bytearray(path.read_bytes())
    at = content.index(b"ds64")
    content[at + 16 : at + 24] = struct.pack("<Q", size)
    path.write_bytes(content)
    assert read_audio(path, RATE, 1).shape[1] == RATE


@pytest.mark.parametrize("tag", [b"", ID3], ids=["plain", "tagged"])
def test_a_flac_of_unknown_length_goes_through_ffmpeg(tag: bytes, tmp_path: Path):
    path = clip(tmp_path, ".flac")
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(tag + content)
    if shutil.which("ffmpeg") is None:
        assert "needs ffmpeg; install it" in refusal(duration_s, path)
    else:
        assert length_s(path) == pytest.approx(1.0, abs=1 / RATE)


def test_a_length_that_no_file_of_its_size_has_is_not_believed(tmp_path: Path):
    path = clip(tmp_path, ".flac")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # of 36 bits
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"truncated|more than"):
        duration_s(path)


@needs_ffmpeg
def test_a_playlist_does_not_name_other_files(tmp_path: Path):
    other = clip(tmp_path, ".flac")
    (tmp_path / "a.m4a").write_text(f"ffconcat version 1.0\nfile {other.name}\n")
    assert "unreadable by ffmpeg" in refusal(duration_s, tmp_path / "a.m4a")


def test_without_ffmpeg_its_formats_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.m4a").write_bytes(b"x" * 100)
    assert "a.m4a: needs ffmpeg; install it" in refusal(duration_s, tmp_path / "a.m4a")


@needs_ffmpeg
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".m4a", ["-c:a", "aac"]),
        (".aac", ["-c:a", "aac"]),
        (".wma", ["-c:a", "wmav2"]),
        (".ogg", ["-c:a", "flac"]),
    ],
)
def test_what_soundfile_cannot_read_goes_through_ffmpeg(
    suffix: str, options: list[str], tmp_path: Path
):
    source = clip(tmp_path, ".wav")
    command = ["ffmpeg", "-v", "error", "-i", str(source), *options, str(tmp_path / f"a{suffix}")]
    subprocess.run(command, check=True)
    assert length_s(tmp_path / f"a{suffix}") == pytest.approx(1.0, abs=0.2)
    shutil.copy(tmp_path / f"a{suffix}", tmp_path / "renamed.mp3")
    assert length_s(tmp_path / "renamed.mp3") == length_s(tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").write_bytes(b"no audio" * 50)
    # The content of an .ogg decides whether ffmpeg is used.
    reason = "unreadable" if suffix == ".ogg" else "unreadable by ffmpeg"
    assert reason in refusal(duration_s, tmp_path / f"a{suffix}")


def test_what_ffmpeg_writes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "bin" / "ffmpeg"
    source = clip(tmp_path, ".wav")
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec /bin/cat {source}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    (tmp_path / "a.m4a").write_bytes(b"x")
    assert length_s(tmp_path / "a.m4a") == 1.0
    monkeypatch.setattr("magnet_train.data.audio.MAX_VALUES", RATE // 4)
    assert "more than 4,000 samples; split it" in refusal(duration_s, tmp_path / "a.m4a")


def test_reasons_send_nobody_the_wrong_way(tmp_path: Path):
    assert "no such file" in refusal(duration_s, tmp_path / "gone.wav")
    (tmp_path / "a.mp3").write_bytes(b"\xff\xf1\x50\x80" + bytes(500))  # AAC's own head
    with pytest.raises(UserError) as caught:
        duration_s(tmp_path / "a.mp3")
    assert "does not exist" not in str(caught.value) and "copy it again" not in str(caught.value)
