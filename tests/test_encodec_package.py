"""Models of the `encodec` package through our interface, compared with the package."""

from pathlib import Path

import pytest
import torch

from magnet_train.codec.base import load_codec
from magnet_train.codec.encodec import NORMALISED_LEVEL
from magnet_train.codec.encodec_names import PACKAGE_MODELS
from magnet_train.common.errors import UserError
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

ensure_torchaudio_imports()
encodec = pytest.importorskip("encodec")


@pytest.fixture
def cache(tmp_path: Path):
    """torch's download cache."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


def package_model(name: str, cache: Path):
    """A random model of published size, with weights in the package's cache."""
    torch.manual_seed(0)
    model = getattr(encodec.EncodecModel, f"encodec_model_{name.split('_')[1]}")(
        pretrained=False
    ).eval()
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_(std=0.3)
    torch.save(model.state_dict(), cache / PACKAGE_MODELS[name][0])
    return model


@torch.no_grad()
@pytest.mark.parametrize("length", [24_000, 10_001])
def test_24_khz_gives_the_codes_and_audio_of_the_package(cache, length):
    theirs = package_model("encodec_24khz", cache)
    theirs.set_target_bandwidth(6.0)  # 8 codebooks
    ours = load_codec("encodec_24khz@8")
    facts = ours.facts
    assert (facts.sample_rate, facts.frame_rate, facts.num_codebooks, facts.codebook_size) == (
        24_000,
        75,
        8,
        1024,
    )
    assert facts.pad_mode == "reflect" and facts.channels == 1
    wav = 0.3 * torch.randn(2, 1, length)
    ((codes, _),) = theirs.encode(wav)
    assert torch.equal(ours.encode(wav), codes)
    assert torch.equal(ours.decode(codes), theirs.decode([(codes, None)]))


@torch.no_grad()
def test_48_khz_gives_the_codes_of_the_package_and_a_steady_frame_rate(cache):
    theirs = package_model("encodec_48khz", cache)
    theirs.set_target_bandwidth(6.0)  # 4 codebooks
    ours = load_codec("encodec_48khz@4")
    assert (ours.facts.channels, ours.facts.frame_rate, ours.facts.num_codebooks) == (2, 150, 4)
    second = 0.2 * torch.randn(1, 2, 48_000)
    codes, scale = theirs.encode(second)[0]  # a second frame holds the hundredth of overlap
    assert torch.equal(ours.encode(second), codes)
    assert torch.allclose(
        ours.decode(codes),
        theirs._decode_frame((codes, scale)) / scale * NORMALISED_LEVEL,
        atol=1e-6,
    )
    # A quiet second after a loud one stays quieter, and every second has 150 frames.
    wav = torch.cat([second, 0.01 * second, second[..., :24_000]], 2)
    assert ours.encode(wav).shape == (1, 4, 375)
    assert torch.equal(ours.encode(10 * wav), ours.encode(wav))
    assert ours.decode(ours.encode(wav)).shape == wav.shape


def test_a_broken_download_is_named(cache):
    file = cache / PACKAGE_MODELS["encodec_24khz"][0]
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=file.name):
        load_codec("encodec_24khz")


def test_without_network_the_message_says_where_the_file_goes(cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        UserError, match=r"no route to host.*put the file at .*encodec_48khz-7e698e3e\.th"
    ):
        load_codec("encodec_48khz")
