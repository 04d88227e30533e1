"""VGGish: two front ends compared with independent values, the network with torchvggish, and a
reference value with weights.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_networks import named_weights, wave
from torch import Tensor

from magnet_train.common.downloads import VGGISH, cache_dir
from magnet_train.common.errors import UserError
from magnet_train.metrics.fad import Moments
from magnet_train.metrics.networks.frontend import mel_filters, resample
from magnet_train.metrics.networks.vggish import TorchVggish, Vggish, load_vggish

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
FRONTEND = json.loads((FIXTURES / "vggish_frontend.json").read_text())
GOLD = json.loads((FIXTURES / "networks.json").read_text())
ANCHOR = json.loads((FIXTURES / "google_sine_anchor.json").read_text())


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    with np.load(FIXTURES / "vggish_frontend.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def without_network(front: type[Vggish]) -> Vggish:
    """The front end, with the 72 million parameters on the meta device."""
    with torch.device("meta"):
        network = front()
    network.hann = torch.hann_window(400)
    network.mel = mel_filters(16_000, 512, 64, "htk", 125, 7500)
    return network


@pytest.fixture(scope="module")
def google() -> Vggish:
    return without_network(Vggish)


@pytest.fixture(scope="module")
def torchvggish() -> Vggish:
    return without_network(TorchVggish)


@pytest.fixture(scope="module")
def network() -> Vggish:
    """The whole network, 290 MB, with weights seeded by name."""
    network = without_network(Vggish)
    weights = named_weights({name: x.shape for name, x in network.state_dict().items()}, gain=1.4)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


# --- front ends -----------------------------------------------------------------------------------


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_log_mel_is_the_fixtures(google: Vggish, given: dict[str, Tensor]):
    near(google.log_mel(given["waveform_float32"]), given["log_mel_float32_input"])


def test_googles_examples_are_the_fixtures(google: Vggish, given: dict[str, Tensor]):
    near(google.examples(given["waveform_int16"].float()), given["google_fad_examples"])


def test_torchvggishs_examples_are_the_fixtures(torchvggish: Vggish, given: dict[str, Tensor]):
    wav = given["waveform_float32"]
    near(torchvggish.examples(torchvggish.level(wav)), given["torchvggish_examples"])


@pytest.mark.parametrize("case", FRONTEND["windows_per_duration"], ids=lambda c: str(c["seconds"]))
def test_windows_of_a_clip(google: Vggish, torchvggish: Vggish, case: dict):
    wav = wave(round(case["seconds"] * 16_000), 16_000)
    for front, expected in ((google, case["google"]), (torchvggish, case["torchvggish"])):
        if len(wav) < round(front.min_duration_s * 16_000):
            assert expected == 0
        else:
            assert len(front.examples(wav)) == expected


def test_each_clip_is_heard_at_its_own_peak(google: Vggish, torchvggish: Vggish):
    """As audiocraft writes clips (16 bits at -1 dBFS) and Google's code reads them: with a positive
    peak of one.
    """
    wav = wave(32_000, 16_000)
    level = google.level(wav)
    assert level.abs().max() == round(10 ** (-1 / 20) * 32768)
    assert (level == level.round()).all()
    loud, quiet = google.examples(google.level(wav)), google.examples(google.level(0.01 * wav))
    assert (loud - quiet).abs().max() < 1e-2  # rounding apart
    assert (torchvggish.examples(wav) - torchvggish.examples(0.01 * wav)).mean() > 1
    negative = -wav.abs()  # divided by its positive maximum only, which is none
    assert torch.isfinite(google.examples(google.level(negative))).all()


def test_silence_is_heard(google: Vggish, torchvggish: Vggish):
    for front in (google, torchvggish):
        examples = front.examples(front.level(torch.zeros(16_000)))
        torch.testing.assert_close(
            examples, torch.full_like(examples, FRONTEND["silence"]["value"])
        )


def test_resampling_is_julius_then_the_mean():
    import julius

    wav = torch.stack([wave(4410, 44_100), wave(4410, 44_100).flip(0)])
    expected = julius.resample_frac(wav, 44_100, 16_000).mean(0)
    torch.testing.assert_close(resample(wav, 44_100, Vggish.sample_rate), expected)
    torch.testing.assert_close(resample(wav[0], 16_000, 16_000), wav[0])
    assert resample(wav[0], 44_100, Vggish.sample_rate).shape == (1600,)


# --- network --------------------------------------------------------------------------------------


def test_parameters_and_names_are_the_releases(google: Vggish):
    assert sum(p.numel() for p in google.parameters()) == 72_141_184
    shapes = {name: tuple(x.shape) for name, x in google.state_dict().items()}
    convolutions = {
        0: (64, 1),
        3: (128, 64),
        6: (256, 128),
        8: (256, 256),
        11: (512, 256),
        13: (512, 512),
    }
    linears = {0: (4096, 12288), 2: (4096, 4096), 4: (128, 4096)}
    expected = {f"features.{i}.weight": (*shape, 3, 3) for i, shape in convolutions.items()}
    expected |= {f"features.{i}.bias": shape[:1] for i, shape in convolutions.items()}
    expected |= {f"embeddings.{i}.weight": shape for i, shape in linears.items()}
    expected |= {f"embeddings.{i}.bias": shape[:1] for i, shape in linears.items()}
    assert shapes == expected


def test_the_network_is_torchvggishs(network: Vggish, given: dict[str, Tensor]):
    """Reference values are from torchvggish's class with the same weights, without its last
    activation, so some are negative.
    """
    expected = torch.tensor(GOLD["vggish"]["embedding_0"])
    assert expected.min() < 0
    torch.testing.assert_close(
        network.embed(given["google_fad_examples"])[0], expected, rtol=1e-4, atol=1e-3
    )


def test_a_window_hears_its_own_second(network: Vggish):
    wav = wave(32_000, 16_000)
    wav[20_000] = 1.0  # the same peak with and without the rest
    only = torch.zeros_like(wav)
    only[16_000:] = wav[16_000:]
    whole, part = network(wav), network(only)
    assert whole.shape == part.shape == (3, 128)
    torch.testing.assert_close(part[2], whole[2])
    assert (part[0] - whole[0]).abs().max() > 0.1
    assert torch.equal(network(wav), whole) and not whole.requires_grad


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(15_999), "at least 1.000 s"),
        (torch.zeros(0), "at least 1.000 s"),
        (torch.zeros(1, 16_000), r"shape \(1, 16000\)"),
        (torch.full((16_000,), float("nan")), "NaN or infinite"),
        (torch.full((16_000,), float("inf")), "NaN or infinite"),
    ],
)
def test_bad_clips_are_named(google: Vggish, wav: Tensor, message: str):
    with pytest.raises(UserError, match=message) as error:
        google(wav)
    assert "\n" not in str(error.value)


def test_missing_and_other_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"VGGish weights: not in the cache.*HF_HUB_OFFLINE.*vggish-10086976\.pth"
    ):
        load_vggish()
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match=r"other\.pth: SHA-256 is .*, not 10086976"):
        load_vggish(str(other))


# --- with the published weights -------------------------------------------------------------------


def sines(count: int, noise: float) -> list[Tensor]:
    """Google's test clips (gen_test_files.py): 6 s of a sine at `count` frequencies from 100 to
    1000 Hz, with noise.

    Values beyond 16 bits wrap around as in Google's script, so the noise causes clicks.
    """
    rng = np.random.default_rng(0)
    clips = []
    for frequency in np.linspace(100, 1000, count):
        x = np.sin(2 * np.pi * frequency * np.linspace(0, 6, 96_000))
        x = x + rng.normal(0, noise, len(x)) * np.abs(x).max()
        clips.append(torch.from_numpy((2**15 * x).astype(np.int64).astype(np.int16)).float())
    return clips


@pytest.mark.skipif(
    not (cache_dir() / VGGISH.file).is_file(), reason="VGGish's weights are not in the cache"
)
@pytest.mark.parametrize(
    "test_set, noise", [("background_vs_test1", 1e-4), ("background_vs_test2", 1e-5)]
)
def test_googles_own_distances(test_set: str, noise: float):
    network = load_vggish()

    def moments(clips: list[Tensor]) -> Moments:
        # Only Google's part of the front end, because these clips are not at audiocraft's level.
        with torch.no_grad():
            return Moments.of(torch.cat([network.embed(network.examples(clip)) for clip in clips]))

    generated = moments(sines(5, noise))
    assert generated.count == 5 * ANCHOR["windows_per_clip"]["google_0.5s_hop"]
    expected = ANCHOR["fad_google_tensorflow"][test_set]
    assert generated.distance(moments(sines(10, 0))) == pytest.approx(expected, abs=0.2)
