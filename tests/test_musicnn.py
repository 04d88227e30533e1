"""musicnn compared with librosa and its published graph; chroma; TensorFlow checkpoint reader."""

import json
import struct
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import soundfile
import torch
from helpers_errors import refusal
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.chroma import chroma, chroma_agreement
from magnet_train.metrics.networks import frontend
from magnet_train.metrics.networks.frontend import mel_filters
from magnet_train.metrics.networks.musicnn import TAGS, load_musicnn, reference_arrays

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
DEMO = Path(__file__).parents[1] / "data" / "demo"
MUSICNN = json.loads((FIXTURES / "musicnn.json").read_text())


# --- musicnn --------------------------------------------------------------------------------------


def four_notes() -> Tensor:
    """4 s at 16 kHz: the notes of an A major chord in sequence, decaying."""
    t = np.arange(64000) / 16000
    wav = np.zeros(64000)
    for k, pitch in enumerate((220.0, 277.18, 329.63, 440.0)):
        since = np.maximum(t - 0.8 * k, 0)
        harmonics = sum(np.sin(2 * np.pi * pitch * h * since) / h**1.5 for h in range(1, 9))
        wav += (t >= 0.8 * k) * np.exp(-2 * since) * harmonics
    return torch.from_numpy((0.2 * wav).astype(np.float32))


def test_mel_filters_are_librosas():
    filters = mel_filters(16_000, 512, 96, "slaney")
    assert filters.shape == (96, 257)
    torch.testing.assert_close(
        filters.sum(1), torch.tensor(MUSICNN["mel_row_sums"]), rtol=1e-4, atol=1e-7
    )
    assert filters.argmax(1).tolist() == MUSICNN["mel_peak_bins"]


def test_spectrogram_is_librosas():
    spectrogram = load_musicnn().spectrogram(four_notes())
    assert spectrogram.shape == (251, 96)
    torch.testing.assert_close(
        spectrogram.mean(0), torch.tensor(MUSICNN["log_mel_mean"]), rtol=0, atol=1e-3
    )


def test_musicnn_is_the_published_network():
    """Compared with its graph in float64 NumPy with the checkpoint's tensors; ours are rounded to
    float16.
    """
    heard = load_musicnn()(four_notes())
    assert heard.embeddings.shape[1:] == (200,)
    assert heard.tags.shape[1:] == (50,)
    assert heard.features.shape[1:] == (1506,)
    torch.testing.assert_close(heard.tags[0], torch.tensor(MUSICNN["tags"]), rtol=0, atol=3e-3)
    torch.testing.assert_close(
        heard.embeddings[0], torch.tensor(MUSICNN["embeddings"]), rtol=0, atol=2e-2
    )


@pytest.mark.parametrize("seconds, windows", [(2.992, 1), (4.5, 2), (10, 5), (13, 7)])
def test_windows_start_every_one_and_a_half_seconds(seconds: float, windows: int):
    wav = four_notes().repeat(4)[: round(seconds * 16_000)]
    heard = load_musicnn()(wav)
    assert len(heard.embeddings) == len(heard.tags) == windows


def test_a_window_hears_its_own_three_seconds():
    """The second window starts at frame 94 of 256 samples and has 187 frames."""
    wav = four_notes().repeat(3)
    only = torch.zeros_like(wav)
    first, last = 93 * 256, (94 + 187) * 256
    only[first:last] = wav[first:last]
    whole, part = load_musicnn()(wav), load_musicnn()(only)
    torch.testing.assert_close(part.embeddings[1], whole.embeddings[1], rtol=0, atol=1e-3)
    assert (part.embeddings[3] - whole.embeddings[3]).abs().max() > 0.1


def test_a_tone_at_44_kHz_is_resampled():
    """440 Hz stays the strongest bin of the resampled audio, in a 1 s spectrum."""
    t = np.arange(44_100) / 44_100
    wav = load_musicnn().resample(
        torch.from_numpy(np.sin(2 * np.pi * 440 * t).astype(np.float32)), 44_100
    )
    assert abs(len(wav) - 16_000) <= 1
    assert torch.fft.rfft(wav).abs().argmax().item() == 440


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(40_000), "2.500 s is too short"),
        (torch.zeros(0), "too short"),
        (torch.zeros(2, 64_000), "needs mono clips"),
        (torch.full((64_000,), float("nan")), "NaN or infinite"),
    ],
)
def test_what_musicnn_cannot_hear_is_named(wav: Tensor, message: str):
    with pytest.raises(UserError, match=message):
        load_musicnn()(wav)


def test_silence_and_loud_samples_have_finite_outputs():
    for wav in (torch.zeros(64_000), 32768 * torch.sin(torch.arange(64_000) * 0.1)):
        output = load_musicnn()(wav)
        assert torch.isfinite(output.embeddings).all() and torch.isfinite(output.tags).all()


def test_arrays_that_a_shard_stores_of_a_real_clip():
    wav = torch.randn(44_100 * 6)
    kept = reference_arrays(wav, 44_100)
    assert kept is not None
    assert {name: (x.shape, x.dtype) for name, x in kept.items()} == {
        "embeddings": ((3, 200), np.float32),
        "tags": ((3, 50), np.float32),
    }
    assert reference_arrays(wav[:44_100], 44_100) is None


def test_missing_or_broken_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontend, "demo_path", lambda name: tmp_path)
    assert "missing or broken" in refusal(load_musicnn.__wrapped__)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "missing or broken" in refusal(load_musicnn.__wrapped__)


NAMED_BY = {
    "piano": "piano",
    "steel-string guitar": "guitar",
    "flute": "flute",
    "choir": "choir",
    "recorder": "flute",
}


def shipped_solos() -> list[tuple[Path, str]]:
    found = []
    for path in sorted((DEMO / "clips").glob("*.json")):
        instruments = json.loads(path.read_text()).get("instruments", [])
        audio = next(
            (
                a
                for a in (path.with_suffix(s) for s in (".flac", ".wav", ".ogg", ".mp3"))
                if a.exists()
            ),
            None,
        )
        if len(instruments) == 1 and instruments[0] in NAMED_BY and audio:
            found.append((audio, NAMED_BY[instruments[0]]))
    return found


def test_shipped_solos_are_heard_as_what_they_are():
    solos = shipped_solos()
    if not solos:
        pytest.skip("no solo of an instrument that musicnn names among data/demo/clips")
    for path, tag in solos:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
        network = load_musicnn()
        heard = network(network.resample(torch.from_numpy(wav.mean(1)), rate)).tags.mean(0)
        best = [TAGS[i] for i in heard.topk(3).indices]
        assert tag in best, f"{path.name}: {best}"


# --- the reader of TensorFlow checkpoints ---------------------------------------------------------


def test_reader_of_tensorflow_checkpoints():
    """A bundle built by hand: keys with a common prefix, a scalar, and an integer to skip."""
    read_bundle = run_path(str(DEMO / "convert_musicnn.py"))["read_bundle"]

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def block(entries: list[tuple[int, bytes, bytes]]) -> bytes:
        body = b"".join(varint(s) + varint(len(k)) + varint(len(v)) + k + v for s, k, v in entries)
        return body + struct.pack("<II", 0, 1) + b"\0" + b"crc!"

    def entry(kind: int, shape: list[int], offset: int, size: int) -> bytes:
        dims = b"".join(field(2, field(1, n)) for n in shape)
        return (
            field(1, kind)
            + field(2, dims)
            + field(4, offset)
            + field(5, size)
            + varint(6 << 3 | 5)
            + b"crc!"
        )

    matrix = np.arange(200, dtype="<f4").reshape(2, 100)
    data = matrix.tobytes() + np.float32(7).tobytes() + np.int64(3).tobytes()
    table = block(
        [
            (0, b"", b""),
            (0, b"dense/bias", entry(1, [], 800, 4)),
            (6, b"kernel", entry(1, [2, 100], 0, 800)),
            (0, b"step", entry(9, [], 804, 8)),
        ]
    )
    index = block([(0, b"step", varint(0) + varint(len(table) - 5))])
    handles = varint(0) + varint(0) + varint(len(table)) + varint(len(index) - 5)
    tensors = read_bundle(table + index + handles.ljust(48, b"\0"), data)
    assert list(tensors) == ["dense/bias", "dense/kernel"]
    np.testing.assert_array_equal(tensors["dense/kernel"], matrix)
    assert tensors["dense/bias"] == 7


# --- pitch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("midi", range(48, 84, 5))
def test_chroma_of_a_tone_is_its_pitch_class(midi: int):
    pitch = 440 * 2 ** ((midi - 69) / 12)
    found = chroma(np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000), 16_000)
    assert set(found.argmax(1)) == {midi % 12}
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)


def test_chroma_of_silence_is_zero():
    found = chroma(np.zeros(16_000), 16_000)
    assert found.shape == (12, 12)  # (16,000 - 4,096) // 1,024 + 1 moments
    assert not found.any()


def test_agreement_counts_only_moments_that_sound():
    tone = np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    a, zero = chroma(tone, 16_000), chroma(0 * tone, 16_000)
    both = np.concatenate([a, zero])
    assert chroma_agreement(a, a) == pytest.approx((1, 1))
    assert chroma_agreement(a, zero) == (0, 0)
    assert chroma_agreement(both, both) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="silent"):
        chroma_agreement(zero, a)
