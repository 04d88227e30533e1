"""FAD and KL against independent numbers (tests/fixtures/metrics), on one process and two; musicnn against librosa."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.multiprocessing as mp
from torch import Tensor

from magnet_train.errors import UserError
from magnet_train.metrics import embedders
from magnet_train.metrics.chroma import chroma
from magnet_train.metrics.embedders import TAGS, load_musicnn, slaney_mel_filters
from magnet_train.metrics.fad import FrechetAudioDistance, frechet_distance
from magnet_train.metrics.kl import TagKL, kl_divergence, tag_distribution

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
DEMO = Path(__file__).parents[1] / "data" / "demo"
FRECHET = json.loads((FIXTURES / "frechet.json").read_text())
STREAMING = json.loads((FIXTURES / "streaming.json").read_text())
KL = json.loads((FIXTURES / "kl.json").read_text())
MUSICNN = json.loads((FIXTURES / "musicnn.json").read_text())


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def near(value: float, expected: float, tolerance: float = 1e-6) -> bool:
    """Within 1e-6, absolute or relative, whichever is looser: the fixtures' own tolerance."""
    return abs(value - expected) <= tolerance * max(1.0, abs(expected))


# --- Fréchet distance ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    return arrays("frechet_embeddings.npz")


def test_there_are_seventeen_sets_and_seven_closed_forms():
    assert (len(FRECHET["cases"]), len(FRECHET["closed_form"])) == (17, 7)


@pytest.mark.parametrize("case", FRECHET["cases"], ids=lambda c: c["name"])
def test_distance_of_two_sets(case: dict, sets: dict[str, Tensor]):
    x, y = sets[case["name"] + "__x"], sets[case["name"] + "__y"]
    direct = frechet_distance(*moments(x), *moments(y))
    metric = FrechetAudioDistance(x.shape[1])
    for part in x.split(37):
        metric.update(part)
    for part in y.split(23):
        metric.update_reference(part)
    for value in (direct, metric.compute().item()):
        assert value >= 0
        assert near(value, case["expected"])


@pytest.mark.parametrize("case", FRECHET["closed_form"], ids=lambda c: c["name"])
def test_distance_with_an_analytic_answer(case: dict):
    given = arrays("frechet_closed_form.npz")
    parts = [given[f"{case['name']}__{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")]
    assert near(frechet_distance(*parts), case["expected"])


def test_distance_is_symmetric_and_zero_to_itself(sets: dict[str, Tensor]):
    x, y = moments(sets["d128_n40_rankdef__x"]), moments(sets["d128_n40_rankdef__y"])
    assert near(frechet_distance(*x, *y), frechet_distance(*y, *x))
    assert 0 <= frechet_distance(*x, *x) < 1e-6


def test_two_windows_are_enough():
    metric = FrechetAudioDistance(3)
    metric.update(torch.tensor([[0.0, 0, 0], [2, 0, 0]]))
    metric.update_reference(torch.tensor([[0.0, 1, 0], [2, 1, 0]]))
    assert near(metric.compute().item(), 1.0)


def test_sums_survive_means_far_from_zero():
    """In float32 sums this comes out negative; the values are what the same windows give without their offset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    y = 1.2 * torch.randn(300, 16, generator=generator, dtype=torch.float64) + 0.1
    expected = frechet_distance(*moments(x), *moments(y))
    metric = FrechetAudioDistance(16)
    for part in (x + 1e4).split(50):
        metric.update(part)
    metric.update_reference(y + 1e4)
    assert near(metric.compute().item(), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_and_their_order_do_not_matter(order: int):
    """One of the chunks is empty."""
    given = arrays("streaming.npz")
    metric = FrechetAudioDistance(given["gen"].shape[1])
    for first, last in STREAMING["chunks"][::order]:
        metric.update(given["gen"][first:last])
    metric.update_reference(given["ref"])
    assert near(metric.compute().item(), STREAMING["expected_fd"])


def test_an_item_counts_once():
    """The padded duplicate of a distributed sampler, 199.92 where it is counted twice."""
    given = arrays("streaming.npz")
    metric = FrechetAudioDistance(given["gen"].shape[1])
    for clip in [*range(13), 0, 7]:
        metric.update(given["gen"][given["gen_clip"] == clip], key=str(clip))
    for _ in range(2):  # the same name on the other side is another item
        metric.update_reference(given["ref"], key="0")
    assert near(metric.compute().item(), STREAMING["expected_fd"])


def test_reset_forgets_sums_and_names():
    metric = FrechetAudioDistance(2)
    metric.update(torch.randn(5, 2), key="a")
    metric.update_reference(torch.randn(5, 2), key="a")
    metric.compute()
    metric.reset()
    x = torch.tensor([[0.0, 0], [1, 1]])
    metric.update(x, key="a")
    metric.update_reference(x, key="a")
    assert metric.compute().item() < 1e-9


def test_a_later_reference_changes_the_distance():
    metric = FrechetAudioDistance(1)
    metric.update(torch.tensor([[0.0], [1.0]]))
    metric.update_reference(torch.tensor([[0.0], [1.0]]))
    assert metric.compute().item() < 1e-9
    metric.update_reference(torch.tensor([[9.0]]))
    assert metric.compute().item() > 1


@pytest.mark.parametrize("side", ["generated", "reference"])
@pytest.mark.parametrize("windows", [0, 1])
def test_fewer_than_two_windows_are_an_error(side: str, windows: int):
    metric = FrechetAudioDistance(4)
    few, many = torch.randn(windows, 4), torch.randn(9, 4)
    metric.update(few if side == "generated" else many)
    metric.update_reference(few if side == "reference" else many)
    with pytest.raises(UserError, match=f"{side} windows"):
        metric.compute()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_embedding_names_its_clip(bad: float):
    metric = FrechetAudioDistance(4)
    x = torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(UserError, match="clip bach_01"):
        metric.update(x, key="bach_01")
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(torch.full((2,), bad), torch.eye(2), torch.zeros(2), torch.eye(2))


def test_another_width_is_an_error():
    metric = FrechetAudioDistance(4)
    with pytest.raises(ValueError, match="n x 4"):
        metric.update(torch.randn(3, 5))
    with pytest.raises(ValueError, match="n x 4"):
        metric.update_reference(torch.randn(4))
    with pytest.raises(ValueError, match="width"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


# --- KL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logits() -> dict[str, Tensor]:
    return arrays("kl_logits.npz")


def test_audiocrafts_convention(logits: dict[str, Tensor]):
    generated, reference = (logits[side].double().softmax(-1) for side in ("gen", "ref"))
    segments = kl_divergence(reference, generated)
    torch.testing.assert_close(segments, torch.tensor(KL["audiocraft_per_segment"]).double(), rtol=1e-6, atol=1e-9)
    backward = kl_divergence(generated, reference).mean().item()
    assert near(segments.mean().item(), KL["audiocraft"]["kld"])
    assert near(backward, KL["audiocraft"]["kld_qp"])
    assert near(segments.mean().item() + backward, KL["audiocraft"]["kld_both"])
    single = kl_divergence(logits["ref"].softmax(-1), logits["gen"].softmax(-1)).mean().item()
    assert near(single, KL["float32_torch_value"], 1e-5)


def test_other_conventions_in_use(logits: dict[str, Tensor]):
    """The same divergence by another direction, epsilon, or order of averaging."""
    generated, reference = logits["gen"].double(), logits["ref"].double()
    p, q = reference.softmax(-1), generated.softmax(-1)
    variants = KL["aggregation_variants"]
    clips = [logits["clip"] == clip for clip in logits["clip"].unique()]

    def by_clip(x: Tensor) -> Tensor:
        return torch.stack([x[clip].mean(0) for clip in clips])

    for value, expected in (
        (kl_divergence(p, q, epsilon=0), KL["no_eps_KL_ref_gen"]),
        (kl_divergence(q, p, epsilon=0), KL["no_eps_KL_gen_ref"]),
        (by_clip(kl_divergence(p, q)), variants["mean_over_clips_of_segment_means"]),
        (kl_divergence(by_clip(p), by_clip(q)), variants["mean_probabilities_then_kl"]),
        (kl_divergence(by_clip(reference).softmax(-1), by_clip(generated).softmax(-1)),
         variants["mean_logits_then_softmax_then_kl"]),
        (kl_divergence(reference.sigmoid(), generated.sigmoid()), KL["audioldm_eval_sigmoid"]),
    ):  # fmt: skip
        assert near(value.mean().item(), expected, 1e-5)


@pytest.mark.parametrize("case", KL["edge_cases"], ids=lambda c: c["name"])
def test_edge_cases_of_kl(case: dict):
    reference, generated = (torch.tensor(case[side], dtype=torch.float64) for side in ("ref", "gen"))
    assert kl_divergence(reference, generated).item() == pytest.approx(case["audiocraft"], abs=1e-9)


def test_tag_kl_averages_windows_then_clips():
    """Sum-normalised sigmoids: their own convention, equal to a few lines of numpy."""
    rng = np.random.default_rng(0)
    pairs = [(rng.uniform(0.01, 0.99, (n, 50)), rng.uniform(0.01, 0.99, (m, 50))) for n, m in ((3, 5), (1, 1), (4, 2))]
    expected = []
    for reference, generated in pairs:
        p, q = (x.mean(0) / x.mean(0).sum() for x in (reference, generated))
        expected.append((p * (np.log(p) - np.log(q + 1e-6))).sum())
    metric = TagKL()
    for i, (reference, generated) in enumerate(pairs):
        for _ in range(2):
            metric.update(torch.from_numpy(reference), torch.from_numpy(generated), key=str(i))
    assert near(metric.compute().item(), float(np.mean(expected)), 1e-9)
    mean = torch.from_numpy(pairs[0][0]).mean(0)
    torch.testing.assert_close(tag_distribution(mean).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_tag_kl_of_no_clip_is_an_error():
    with pytest.raises(UserError, match="no pair of clips"):
        TagKL().compute()


# --- two processes ------------------------------------------------------------------------------------------------

SHARES = {
    "uneven": STREAMING["ranks2_no_padding"],
    "empty": STREAMING["rank_with_no_data"],
    "padded": [STREAMING["ranks2_no_padding"][0], [*STREAMING["ranks2_no_padding"][1], 1, 3]],
}


def _score_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given = arrays("streaming.npz")
    width = given["gen"].shape[1]
    values = {}
    for name, shares in SHARES.items():
        fad, kl = FrechetAudioDistance(width), TagKL()
        for clip in shares[rank]:
            windows = given["gen"][given["gen_clip"] == clip]
            fad.update(windows, key=str(clip))
            kl.update(windows.sigmoid(), windows.sigmoid().flip(-1), key=str(clip))
        if rank == 0:  # the references may lie on one rank alone
            fad.update_reference(given["ref"])
        values[name] = fad.compute().item(), kl.compute().item()
    Path(folder, f"{rank}.json").write_text(json.dumps(values))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path):
    """With uneven shares, with a rank that has nothing, and with items a rank meets twice."""
    mp.spawn(_score_share, (str(tmp_path),), nprocs=2)
    given = arrays("streaming.npz")
    kl = TagKL()
    for clip in range(13):
        windows = given["gen"][given["gen_clip"] == clip].sigmoid()
        kl.update(windows, windows.flip(-1))
    for rank in range(2):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        assert values.keys() == SHARES.keys()
        for fad_value, kl_value in values.values():
            assert near(fad_value, STREAMING["expected_fd"])
            assert near(kl_value, kl.compute().item(), 1e-12)


# --- musicnn ------------------------------------------------------------------------------------------------------


def four_notes() -> Tensor:
    """4 s at 16 kHz: the notes of an A major chord, one after the other, decaying."""
    t = np.arange(64000) / 16000
    wav = np.zeros(64000)
    for k, pitch in enumerate((220.0, 277.18, 329.63, 440.0)):
        since = np.maximum(t - 0.8 * k, 0)
        harmonics = sum(np.sin(2 * np.pi * pitch * h * since) / h**1.5 for h in range(1, 9))
        wav += (t >= 0.8 * k) * np.exp(-2 * since) * harmonics
    return torch.from_numpy((0.2 * wav).astype(np.float32))


def test_mel_filters_are_librosas():
    filters = slaney_mel_filters(16_000, 512, 96)
    assert filters.shape == (96, 257)
    torch.testing.assert_close(filters.sum(1), torch.tensor(MUSICNN["mel_row_sums"]), rtol=1e-4, atol=1e-7)
    assert filters.argmax(1).tolist() == MUSICNN["mel_peak_bins"]


def test_spectrogram_is_librosas():
    spectrogram = load_musicnn().spectrogram(four_notes())
    assert spectrogram.shape == (251, 96)
    torch.testing.assert_close(spectrogram.mean(0), torch.tensor(MUSICNN["log_mel_mean"]), rtol=0, atol=1e-3)


def test_musicnn_is_the_published_network():
    """Against its graph written in numpy, float64, on the checkpoint's own tensors; ours are rounded to float16."""
    heard = load_musicnn()(four_notes())
    assert heard.embeddings.shape[1:] == (200,)
    assert heard.tags.shape[1:] == (50,)
    assert heard.features.shape[1:] == (1506,)
    torch.testing.assert_close(heard.tags[0], torch.tensor(MUSICNN["tags"]), rtol=0, atol=3e-3)
    torch.testing.assert_close(heard.embeddings[0], torch.tensor(MUSICNN["embeddings"]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("seconds, windows", [(2.992, 1), (4.5, 2), (10, 5), (13, 7)])
def test_windows_begin_every_one_and_a_half_seconds(seconds: float, windows: int):
    wav = four_notes().repeat(4)[: round(seconds * 16_000)]
    heard = load_musicnn()(wav)
    assert len(heard.embeddings) == len(heard.tags) == windows


def test_a_window_hears_its_own_three_seconds():
    """The second window begins 94 spectrogram frames of 256 samples in and is 187 long."""
    wav = four_notes().repeat(3)
    only = torch.zeros_like(wav)
    first, last = 93 * 256, (94 + 187) * 256
    only[first:last] = wav[first:last]
    whole, part = load_musicnn()(wav), load_musicnn()(only)
    torch.testing.assert_close(part.embeddings[1], whole.embeddings[1], rtol=0, atol=1e-3)
    assert (part.embeddings[3] - whole.embeddings[3]).abs().max() > 0.1


def test_a_tone_at_44_kHz_is_resampled():
    """440 Hz stays 440 Hz: the strongest bin of 16 kHz audio with a 1 s spectrum."""
    t = np.arange(44_100) / 44_100
    wav = load_musicnn().resample(torch.from_numpy(np.sin(2 * np.pi * 440 * t).astype(np.float32)), 44_100)
    assert abs(len(wav) - 16_000) <= 1
    assert torch.fft.rfft(wav).abs().argmax().item() == 440


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(40_000), "2.50 s is too short"),
        (torch.zeros(0), "too short"),
        (torch.zeros(2, 64_000), "too short"),
        (torch.full((64_000,), float("nan")), "NaN or infinite"),
    ],
)
def test_what_musicnn_cannot_hear_is_named(wav: Tensor, message: str):
    with pytest.raises(UserError, match=message):
        load_musicnn()(wav)


def test_silence_has_finite_scores():
    heard = load_musicnn()(torch.zeros(160_000))
    metric = FrechetAudioDistance(200)
    metric.update(heard.embeddings)
    metric.update_reference(load_musicnn()(torch.randn(160_000)).embeddings)
    assert np.isfinite(metric.compute().item())


def test_missing_or_broken_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedders, "demo_path", lambda name: tmp_path)
    with pytest.raises(UserError, match="missing or broken"):
        load_musicnn.__wrapped__()
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="missing or broken"):
        load_musicnn.__wrapped__()


NAMED_BY = {"piano": "piano", "steel-string guitar": "guitar", "flute": "flute", "choir": "choir", "recorder": "flute"}


def shipped_solos() -> list[tuple[Path, str]]:
    found = []
    for path in sorted((DEMO / "clips").glob("*.json")):
        instruments = json.loads(path.read_text()).get("instruments", [])
        audio = next((a for a in (path.with_suffix(s) for s in (".flac", ".wav", ".ogg", ".mp3")) if a.exists()), None)
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


# --- the reader of TensorFlow checkpoints -------------------------------------------------------------------------


def test_reader_of_tensorflow_checkpoints():
    """A bundle of two tensors made by hand: keys that share their beginning, a scalar, an integer to leave out."""
    spec = importlib.util.spec_from_file_location("convert_musicnn", DEMO / "convert_musicnn.py")
    assert spec and spec.loader
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)

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
        return field(1, kind) + field(2, dims) + field(4, offset) + field(5, size) + varint(6 << 3 | 5) + b"crc!"

    matrix = np.arange(200, dtype="<f4").reshape(2, 100)
    data = matrix.tobytes() + np.float32(7).tobytes() + np.int64(3).tobytes()
    table = block([
        (0, b"", b""), (0, b"dense/bias", entry(1, [], 800, 4)), (6, b"kernel", entry(1, [2, 100], 0, 800)),
        (0, b"step", entry(9, [], 804, 8)),
    ])  # fmt: skip
    index = block([(0, b"step", varint(0) + varint(len(table) - 5))])
    handles = varint(0) + varint(0) + varint(len(table)) + varint(len(index) - 5)
    tensors = converter.read_bundle(table + index + handles.ljust(48, b"\0"), data)
    assert list(tensors) == ["dense/bias", "dense/kernel"]
    np.testing.assert_array_equal(tensors["dense/kernel"], matrix)
    assert tensors["dense/bias"] == 7


# --- pitch --------------------------------------------------------------------------------------------------------


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
