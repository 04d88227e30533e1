"""Levels of scored and written audio, file names, and the files next to an audio file."""

import json

import numpy as np
import pyloudnorm
import pytest
import soundfile
from scipy.signal import resample_poly

from magnet_train.common.audio_files import (
    clipped_share,
    listening_loudness,
    normalize_for_listening,
    normalize_loudness,
    slug,
    write_audio,
    write_sound,
)
from magnet_train.common.errors import UserError

RATE = 16_000


def tone(seconds: float = 2.0, level: float = 0.02) -> np.ndarray:
    return level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)[:, None]


def clicks() -> np.ndarray:
    """Quiet noise with a few loud clicks: -14 LUFS would clip them."""
    wav = 0.003 * np.random.default_rng(0).standard_normal((2 * RATE, 1))
    wav[:: RATE // 4] = 0.5
    return wav


def loudness(wav: np.ndarray) -> float:
    return pyloudnorm.Meter(RATE).integrated_loudness(wav)


def true_peak(wav: np.ndarray) -> float:
    return np.abs(resample_poly(wav, 4, 1, axis=0)).max()


@pytest.mark.parametrize("normalize", [normalize_loudness, normalize_for_listening])
def test_loudness_is_minus_14_lufs_and_silence_stays_silent(normalize):
    assert loudness(normalize(tone(), RATE)) == pytest.approx(-14, abs=0.1)
    assert not normalize(np.zeros((2 * RATE, 1)), RATE).any()
    assert len(normalize(tone()[:100], RATE)) == 100


def test_scored_clips_are_clamped_as_audiocraft_does():
    wav = normalize_loudness(clicks(), RATE)
    assert np.abs(wav).max() == 1 and clipped_share(wav) > 0


@pytest.mark.parametrize("channels", [1, 2])
def test_files_have_no_dc_and_are_never_clipped(channels: int, tmp_path):
    sounds = {"dc": tone(level=0.1) + 0.7, "clicks": clicks(), "loud": 3 * tone(level=1.0)}
    for name, wav in sounds.items():
        wav = np.repeat(wav, channels, 1)
        write_audio(tmp_path / f"{name}.wav", wav, RATE, {"prompt": name})
        written, _ = soundfile.read(tmp_path / f"{name}.wav", always_2d=True)
        assert abs(written.mean()) < 1e-3, name
        assert clipped_share(written) == 0 and true_peak(written) <= 10 ** (-1 / 20) + 1e-3, name
        assert loudness(written) <= -14 + 0.1, name
        expected = listening_loudness(wav, RATE)
        assert loudness(written) == pytest.approx(expected, abs=0.1), name


def test_the_json_of_a_file_has_the_share_of_clipped_samples(tmp_path):
    wav = np.clip(3 * tone(level=1.0), -1, 1)
    write_audio(tmp_path / "a.flac", wav, RATE, {"prompt": "x"})
    about = json.loads((tmp_path / "a.json").read_text())
    assert about == {"prompt": "x", "clipped_share": pytest.approx(np.mean(np.abs(wav) == 1))}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.flac", "a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.wav: cannot be written"):
        write_audio(tmp_path / "file" / "a.wav", wav, RATE, {})


@pytest.mark.parametrize(
    "beginning", ["海", "a slow melancholic piano piece with soft strings and a "]
)
def test_prompts_with_the_same_beginning_have_different_names(beginning: str):
    names = {slug(f"{beginning}{chr(i)}", 0) for i in range(0x4E00, 0x4E00 + 5000)}
    assert len(names) == 5000
    assert all(name.isascii() and "/" not in name and len(name) < 120 for name in names)
    assert slug("Slow, sad: cello!", 7).startswith("slow-sad-cello_")
    assert slug("").startswith("no-text_")


def test_long_vorbis_files_are_written(tmp_path):
    wav = 0.1 * np.random.default_rng(0).standard_normal((44_100 * 121, 2))
    write_sound(tmp_path / "long.ogg", wav, 44_100)  # at once, libsndfile ends the process
    assert soundfile.info(tmp_path / "long.ogg").frames == len(wav)
