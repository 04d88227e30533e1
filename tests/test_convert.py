"""Conversion of audiocraft's models in both directions: bit-identical and as the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_audiocraft import CODECS, FIXTURES, codec_package, model_settings, write_audiocraft
from make_components import make_codec, make_t5
from safetensors.torch import load_file

import magnet_train
from magnet_train.__main__ import main
from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.audiocraft.names import correspondence, to_theirs
from magnet_train.audiocraft.read import read_codec, read_config, read_package
from magnet_train.codec.base import load_codec
from magnet_train.common.errors import UserError
from magnet_train.common.nested import flatten
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.release import SavedModel

SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "reference"


def same(one: Path, two: Path) -> None:
    """Whether two exported files have bit-identical content."""
    a, b = (torch.load(p, weights_only=True) for p in (one, two))
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a if k != "best_state")
    if "best_state" in a:
        assert a["best_state"].keys() == b["best_state"].keys()
        for key, value in a["best_state"].items():
            assert value.dtype == b["best_state"][key].dtype and torch.equal(
                value, b["best_state"][key]
            ), key


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    """A T5 of t5-base's width."""
    folder = tmp_path_factory.mktemp("t5")
    make_t5(folder, dim=768)
    return str(folder)


# --- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_the_codec_gives_the_references_codes_and_audio(name, tmp_path, parity):
    read_codec(codec_package(name), tmp_path / "codec", Path("compression_state_dict.bin"))
    codec, data = (
        load_codec(str(tmp_path / "codec")),
        load_file(FIXTURES / "encodec_tiny" / "io.safetensors"),
    )
    expected = json.loads((FIXTURES / "encodec_tiny" / "io.json").read_text())
    worst = 0.0
    for case in [c for c in expected if c.startswith(name)]:
        codes, wanted = codec.encode(data[f"{case}.wav"]), data[f"{case}.codes"].long()
        agree = (codes == wanted).double().mean().item()
        assert agree == 1 or (case == "music32k.n32000" and agree >= 0.99), (
            case
        )  # ties in the reference itself
        audio = codec.decode(wanted)
        assert audio.shape[-1] == expected[case]["decoded_len"]
        worst = max(worst, (audio - data[f"{case}.decoded"]).abs().max().item())
    parity(f"codec {name}: codes and audio", "4 lengths", "codes the same", f"{worst:.1e}")
    assert worst < 1e-5


def test_the_padding_mode_comes_with_the_weights_and_is_stamped(tmp_path):
    facts = {}
    for mode in ("constant", "reflect"):
        read_codec(codec_package(pad_mode=mode), tmp_path / mode, Path("x.bin"))
        facts[mode] = load_codec(str(tmp_path / mode)).facts
        assert facts[mode].pad_mode == mode
    assert facts["constant"].hash != facts["reflect"].hash


def test_published_codecs_keep_all_their_tensors():
    from transformers import EncodecConfig, EncodecModel

    from magnet_train.codec.encodec_names import (
        audiocraft_config,
        to_audiocraft,
        to_transformers,
        transformers_config,
    )

    published = json.loads((FIXTURES / "full_size" / "encodec_keys.json").read_text())
    for name, ratios in (("encodec_32khz", [8, 5, 4, 4]), ("encodec_audiogen_16khz", [8, 5, 4, 2])):
        shapes = {k: list(v) for k, v in published[name]["keys"].items()}
        settings = json.loads(json.dumps(_published_codec(name, ratios)))
        with torch.device("meta"):
            model = EncodecModel(EncodecConfig(**transformers_config(settings, name)))
        own = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert {to_transformers(k): v for k, v in shapes.items()} == own
        assert {
            k: list(v.shape) for k, v in to_audiocraft(model.state_dict(), model.config).items()
        } == shapes
        again = dict(flatten(audiocraft_config(model.config)))
        assert again["seanet.ratios"] == ratios and again["rvq.n_q"] == 4


def _published_codec(name: str, ratios: list[int]) -> dict[str, Any]:
    """The published codecs' settings: those of the tiny codecs with full width."""
    from helpers_audiocraft import codec_settings

    settings = codec_settings(ratios, 32_000 if name == "encodec_32khz" else 16_000)
    settings["seanet"] |= {"dimension": 128, "n_filters": 64}
    settings["rvq"]["bins"] = 2048
    flat = dict(flatten(settings))
    return flat | {"encodec.causal": False}


# --- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_there_and_back_is_equal_to_the_bit(dtype, tmp_path):
    theirs = write_audiocraft(tmp_path / "theirs", dtype)
    release = convert(str(theirs), ConvertOptions(tmp_path / "release"))
    assert {p.name for p in release.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "codec",
    }
    again = convert(str(release), ConvertOptions(tmp_path / "again", to="audiocraft"))
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        same(theirs / file, again / file)
        assert (again / file).stat().st_size < 1.05 * (theirs / file).stat().st_size


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference's own files are not beside this checkout"
)
def test_the_references_own_files_go_there_and_back(tmp_path):
    release = convert(str(SHARED / "published_form"), ConvertOptions(tmp_path / "release"))
    again = convert(str(release), ConvertOptions(tmp_path / "again", to="audiocraft"))
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        same(SHARED / "published_form" / file, again / file)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference's own files are not beside this checkout"
)
def test_the_references_own_configurations_and_pointer_are_read(tmp_path):
    from magnet_train.codec.encodec_names import transformers_config

    for name in CODECS:
        texts = (
            (SHARED / "encodec_tiny" / f"{name}_xp_cfg.yaml").read_text(),
            codec_package(name)["xp.cfg"],
        )
        real, cut_down = (transformers_config(read_config(text, SHARED), name) for text in texts)
        assert real == cut_down
    pointer = read_package(SHARED / "published_form_pointer" / "compression_state_dict.bin")
    source = write_audiocraft(tmp_path / "theirs", codec=pointer)
    with pytest.warns(UserWarning, match="refers to a codec"):
        release = convert(str(source), ConvertOptions(tmp_path / "release"))
    again = convert(str(release), ConvertOptions(tmp_path / "again", to="audiocraft"))
    same(
        SHARED / "published_form_pointer" / "compression_state_dict.bin",
        again / "compression_state_dict.bin",
    )


@torch.no_grad()
def test_a_converted_model_computes_the_references_logits(tmp_path, parity):
    convert(
        str(write_audiocraft(tmp_path / "theirs", torch.float32)),
        ConvertOptions(tmp_path / "release"),
    )
    trained = SavedModel.open(tmp_path / "release")
    network, data = trained.build(), load_file(FIXTURES / "lm_tiny" / "forward.safetensors")
    tokens = data["cond.mask"].bool()
    for row in range(len(tokens)):  # each alone, so that no padding is attended to
        count = max(int(tokens[row].sum()), 1)
        text = network.encode_text(
            data["cond.t5_hidden"][row : row + 1, :count], tokens[row : row + 1, :count]
        )
        padded = not bool(tokens[row].all()) and bool(tokens[row].any())
        if padded:
            continue  # the reference attends to its padding: test_model compares that
        for stage in range(4):
            difference = network(
                data[f"T50.stage{stage}.tokens"][row : row + 1], network.config.stage(stage), text
            )
            difference = difference - data[f"T50.stage{stage}.logits"][row : row + 1]
            assert difference.abs().max() < 2e-5
    assert trained.decoding.decoding_steps == (8, 4, 4, 4) and trained.guidance_dropout == 0.25
    assert trained.crop_s == 1.0 and trained.provenance["licence"] == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("name", "shape"), [("magnet-small", (1024, 16, 24)), ("magnet-medium", (1536, 24, 48))]
)
def test_published_sizes_have_the_references_tensors(name, shape):
    dim, heads, layers = shape
    published = json.loads((FIXTURES / "full_size" / "magnet_keys.json").read_text())[name]
    with torch.device("meta"):
        network = Magnet(MagnetConfig(dim=dim, num_heads=heads, num_layers=layers))
    theirs = to_theirs(network.state_dict(), correspondence(layers, 4))
    assert {k: list(v.shape) for k, v in theirs.items()} == published["keys"]
    assert sum(p.numel() for p in network.parameters()) == published["n_params"]


def test_what_was_trained_here_becomes_a_folder_of_audiocraft(t5, tmp_path):
    make_codec(tmp_path / "codec")
    facts = load_codec(str(tmp_path / "codec")).facts
    network = Magnet(MagnetConfig(dim=32, num_heads=2, num_layers=2, text_dim=768))
    from magnet_train.conditioning import load_text_encoder
    from magnet_train.decoding.decode import DecodingConfig
    from magnet_train.generator import Generator

    decoding = DecodingConfig(decoding_steps=(3, 2, 2, 2), span_scoring="prod", top_p=0.8)
    text = load_text_encoder(t5)
    Generator(network, load_codec(str(tmp_path / "codec")), text, decoding, 2.5).save(
        tmp_path / "ours"
    )
    options = ConvertOptions(tmp_path / "theirs", to="audiocraft", text_encoder="t5-base")
    convert(str(tmp_path / "ours"), options)
    package = torch.load(tmp_path / "theirs" / "state_dict.bin", weights_only=True)
    config = read_config(package["xp.cfg"], Path("x"))
    # Read by audiocraft's loader (models/loaders.py, models/builders.py), but not by ours.
    for key in (
        "solver",
        "attribute_dropout",
        "compression_model_checkpoint",
        "transformer_lm.memory_efficient",
    ):
        assert key in config
    convert(
        str(tmp_path / "theirs"), ConvertOptions(tmp_path / "back", text_encoder=t5, licence="mit")
    )
    back = SavedModel.open(tmp_path / "back")
    assert back.decoding == decoding and back.crop_s == 2.5 and back.provenance["licence"] == "mit"
    assert back.codec["hash"] == facts.hash and back.network == network.config
    for key, value in back.weights().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_a_pointer_stays_a_pointer_and_is_looked_at_later(t5, tmp_path):
    settings = model_settings()
    settings["transformer_lm"]["card"] = 64
    pointer = {"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.4.0a2"}
    theirs = write_audiocraft(tmp_path / "theirs", settings=settings, codec=pointer)
    with pytest.warns(UserWarning, match="refers to a codec that cannot be loaded now"):
        release = convert(str(theirs), ConvertOptions(tmp_path / "release"))
    assert (
        SavedModel.open(release).codec["id"] == "facebook/encodec_32khz"
        and not (release / "codec").exists()
    )
    again = convert(str(release), ConvertOptions(tmp_path / "again", to="audiocraft"))
    same(theirs / "compression_state_dict.bin", again / "compression_state_dict.bin")
    # A local copy can be given instead.
    read_codec(codec_package(), tmp_path / "codec", Path("x.bin"))
    convert(
        str(theirs),
        ConvertOptions(tmp_path / "with", codec=str(tmp_path / "codec"), text_encoder=t5),
    )
    assert magnet_train.load(tmp_path / "with").codec.facts.num_codebooks == 4


def test_a_release_plays_and_is_fine_tuned_under_its_licence(t5, tmp_path, capsys):
    theirs = write_audiocraft(tmp_path / "theirs")
    assert (
        main(["convert", str(theirs), "--out", str(tmp_path / "release"), "--text_encoder", t5])
        == 0
    )
    audio = magnet_train.load(str(tmp_path / "release")).generate(
        ["slow piano"], seed=1, duration_s=0.6
    )
    assert audio.wav.shape == (1, 1, 19_200) and audio.sample_rate == 32_000
    from helpers_data import write_shards

    codec = str((tmp_path / "release" / "codec").resolve())
    shards = write_shards(tmp_path / "shards", codec, [4, 4])
    run = tmp_path / "run"
    args = [
        "fit",
        "--model.init_from",
        str(tmp_path / "release"),
        "--trainer.default_root_dir",
        str(run),
    ]
    args += [
        "--data.train",
        str(shards),
        "--data.validation",
        str(shards),
        "--data.num_workers",
        "0",
    ]
    args += [
        "--trainer.max_steps",
        "3",
        "--trainer.val_check_interval",
        "3",
        "--model.optimizer.warmup_steps",
        "0",
    ]
    args += [
        "--generation.num_prompts",
        "0",
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
    ]
    args += ["--averaging.every_n_steps", "1"]
    assert main([*args, "--data.global_batch_size", "4", "--data.batch_size", "2"]) == 0
    assert "global batch of 4 = 1 devices x 2 examples x 2 accumulated" in capsys.readouterr().out
    tuned, start = SavedModel.open(run), SavedModel.open(tmp_path / "release")
    assert tuned.network == start.network and tuned.crop_s == 1.0 and tuned.guidance_dropout == 0.25
    assert tuned.provenance["step"] == 3 and tuned.decoding == start.decoding
    moved = [not torch.equal(v, start.weights()[k].float()) for k, v in tuned.weights().items()]
    assert all(moved)
    convert(str(run), ConvertOptions(tmp_path / "tuned"))
    assert "license: cc-by-nc-4.0" in (tmp_path / "tuned" / "README.md").read_text()
    assert (tmp_path / "tuned" / "codec" / "config.json").is_file()
    with pytest.raises(UserError, match="derived weights must keep"):
        convert(str(run), ConvertOptions(tmp_path / "freed", licence="mit"))


def test_a_release_goes_to_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            if repo_id.startswith("nobody"):
                raise RuntimeError("401 Unauthorized\nmore")
            calls.append(repo_id)

        def upload_folder(self, folder_path, **more):
            calls.append(sorted(p.name for p in Path(folder_path).iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    convert("demo", ConvertOptions(tmp_path / "a", push_to_hub="me/music"))
    assert calls == ["me/music", ["README.md", "config.json", "model.safetensors"]]
    with pytest.raises(UserError, match=r"nobody/x: 401 Unauthorized; the release is in .*b"):
        convert("demo", ConvertOptions(tmp_path / "b", push_to_hub="nobody/x"))


# --- bad input ------------------------------------------------------------------------------------


def test_mistakes_in_the_options_are_named(tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    release = convert(str(source), ConvertOptions(tmp_path / "release"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for given, options, message in (
        (source, ConvertOptions(tmp_path / "full"), "not an empty folder"),
        (source, ConvertOptions(tmp_path / "x", to="audiocraft"), "is already an audiocraft model"),
        (tmp_path / "nowhere", ConvertOptions(tmp_path / "x"), "not a file, folder or hub id"),
        (
            "facebook/magnet-none",
            ConvertOptions(tmp_path / "x"),
            "not found locally or on the Hugging Face Hub",
        ),
        (
            "magnet-small-10secs",
            ConvertOptions(tmp_path / "x"),
            "facebook/magnet-small-10secs: not found",
        ),
        (
            "demo",
            ConvertOptions(tmp_path / "x", to="audiocraft"),
            "options that audiocraft lacks: context, positions, convolution",
        ),
        (
            source,
            ConvertOptions(tmp_path / "x", codec="demo"),
            "4 codebooks of 256 entries, but the model has 4 of 64",
        ),
        (
            "demo",
            ConvertOptions(tmp_path / "x", codec=str(release / "codec")),
            "4 codebooks of 64 entries",
        ),
        ("demo", ConvertOptions(tmp_path / "x", text_encoder="t5-large"), "'t5-large' has 1024"),
        ("demo", ConvertOptions(tmp_path / "x", push_to_hub="a/b/c"), "give USER/NAME"),
        ("demo", ConvertOptions(tmp_path / "full" / "note.txt" / "x"), "cannot be created"),
    ):
        with pytest.raises(UserError, match=message):
            convert(str(given), options)
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    with pytest.raises(
        UserError, match=r"an audiocraft model; convert it first: magnet_train convert"
    ):
        magnet_train.load(str(source))


def test_a_release_carries_nothing_but_its_codec_out_of_a_folder(tmp_path):
    release = convert(
        str(write_audiocraft(tmp_path / "theirs")), ConvertOptions(tmp_path / "release")
    )
    (release / "codec" / "diary.txt").write_text("mine")
    copy = convert(str(release), ConvertOptions(tmp_path / "copy"))
    names = {p.name for p in (copy / "codec").iterdir()}
    assert names == {"config.json", "model.safetensors", "audiocraft.yaml", "README.md"}
    assert "license: cc-by-nc-4.0" in (copy / "codec" / "README.md").read_text()
    for name in ("./../secret", str(tmp_path), "../secret", "./codec/../../secret"):
        config = json.loads((release / "config.json").read_text())
        config["codec"]["id"] = name
        (release / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="neither in the release's own folder"):
            SavedModel.open(release)


def test_a_codec_that_is_not_the_stamped_one_is_refused_everywhere(t5, tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    release = convert(str(source), ConvertOptions(tmp_path / "release", text_encoder=t5))
    read_codec(codec_package(pad_mode="reflect"), release / "codec", Path("x.bin"))
    for attempt in (
        lambda: magnet_train.load(str(release)),
        lambda: convert(str(release), ConvertOptions(tmp_path / "again")),
        lambda: MagnetModule(
            SavedModel.open(release).network, codec=str(release / "codec"), init_from=str(release)
        ),
    ):
        with pytest.raises(UserError, match="codec mismatch"):
            attempt()
    assert not (tmp_path / "again").exists()


def test_a_folder_called_with_an_at_is_a_folder(tmp_path):
    source = write_audiocraft(tmp_path / "me@home")
    release = convert(str(source), ConvertOptions(tmp_path / "my@4"))
    assert (
        convert(str(release), ConvertOptions(tmp_path / "copy@2")) / "codec" / "config.json"
    ).is_file()
    same(
        source / "state_dict.bin",
        convert(str(release), ConvertOptions(tmp_path / "b", "audiocraft")) / "state_dict.bin",
    )


def test_settings_that_changed_go_back_changed(tmp_path):
    release = convert(
        str(write_audiocraft(tmp_path / "theirs")), ConvertOptions(tmp_path / "release")
    )
    config = json.loads((release / "config.json").read_text())
    config["decoding"]["temperature"], config["crop_s"] = 1.5, 2.0
    (release / "config.json").write_text(json.dumps(config))
    options = ConvertOptions(
        tmp_path / "again", to="audiocraft", text_encoder="google/flan-t5-base"
    )
    package = torch.load(convert(str(release), options) / "state_dict.bin", weights_only=True)
    again = read_config(package["xp.cfg"], tmp_path)
    assert again["generate.lm.temp"] == 1.5 and again["dataset.segment_duration"] == 2
    assert again["conditioners.description.t5.name"] == "google/flan-t5-base"


def test_a_run_goes_on_without_the_release_it_began_with(t5, tmp_path):
    release = convert(
        str(write_audiocraft(tmp_path / "theirs")),
        ConvertOptions(tmp_path / "release", text_encoder=t5),
    )
    from helpers_data import write_shards

    read_codec(codec_package(), tmp_path / "codec", Path("x.bin"))
    shards = write_shards(tmp_path / "shards", str(tmp_path / "codec"), [4, 4])
    run = tmp_path / "run"
    args = [
        "--data.train",
        str(shards),
        "--data.validation",
        str(shards),
        "--data.num_workers",
        "0",
    ]
    args += [
        "--model.codec",
        str(tmp_path / "codec"),
        "--model.text_encoder",
        t5,
        "--trainer.default_root_dir",
        str(run),
        "--model.optimizer.warmup_steps=0",
    ]
    args += [
        "--generation.num_prompts",
        "0",
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
    ]
    args += ["--trainer.val_check_interval", "2", "--data.global_batch_size", "4"]
    assert main(["fit", "--model.init_from", str(release), *args, "--trainer.max_steps", "2"]) == 0
    release.rename(tmp_path / "moved")
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert (
        main(
            [
                "fit",
                "--config",
                str(run / "config.yaml"),
                *args,
                *checkpoint,
                "--trainer.max_steps",
                "4",
            ]
        )
        == 0
    )
    about = SavedModel.open(run).provenance
    assert about["step"] == 4 and about["licence"] == "cc-by-nc-4.0"
    # Options override the checkpoint.
    own = ["--model.codec", str(tmp_path / "nowhere")]
    assert main(["validate", *args[:4], "--trainer.logger", "false", *checkpoint, *own]) == 2
