"""Conversion of audiocraft's models in both directions: bit-identical and as the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_audiocraft import CODECS, FIXTURES, codec_package, model_settings, write_audiocraft
from helpers_data import write_shards
from make_components import make_codec, make_t5
from safetensors.torch import load_file

import magnet_train
from magnet_train.__main__ import main
from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.audiocraft.names import correspondence, to_theirs
from magnet_train.audiocraft.read import read_codec, read_config, read_package
from magnet_train.codec.base import load_codec
from magnet_train.common.errors import UserError
from magnet_train.common.yaml_files import flatten
from magnet_train.conditioning import load_text_encoder
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import Generator
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


def to(out: Path, source: str | Path, to: str = "release", **options: Any) -> Path:
    """Converts into a folder."""
    return convert(str(source), ConvertOptions(out, to, **options))


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A folder of audiocraft's."""
    return write_audiocraft(tmp_path / "theirs")


@pytest.fixture
def release(tmp_path, theirs, t5) -> Path:
    """The release that it becomes."""
    return to(tmp_path / "release", theirs, text_encoder=t5)


NEEDS_SHARED = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference's own files are not beside this checkout"
)


# --- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_the_codec_gives_the_references_codes_and_audio(name, tmp_path, parity):
    read_codec(codec_package(name), tmp_path / "codec", Path("compression_state_dict.bin"))
    codec = load_codec(str(tmp_path / "codec"))
    data = load_file(FIXTURES / "encodec_tiny" / "io.safetensors")
    expected = json.loads((FIXTURES / "encodec_tiny" / "io.json").read_text())
    worst = 0.0
    for case in [c for c in expected if c.startswith(name)]:
        codes, wanted = codec.encode(data[f"{case}.wav"]), data[f"{case}.codes"].long()
        agree = (codes == wanted).double().mean().item()
        # Ties in the reference itself.
        assert agree == 1 or (case == "music32k.n32000" and agree >= 0.99), case
        audio = codec.decode(wanted)
        assert audio.shape[-1] == expected[case]["decoded_len"]
        worst = max(worst, (audio - data[f"{case}.decoded"]).abs().max().item())
    parity(f"codec {name}: codes and audio", "4 lengths", "codes the same", f"{worst:.1e}")
    assert worst < 1e-5


def test_the_padding_mode_comes_with_the_weights_and_is_recorded(tmp_path):
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
    release = to(tmp_path / "release", theirs)
    names = {"config.json", "model.safetensors", "README.md", "codec"}
    assert {p.name for p in release.iterdir()} == names
    again = to(tmp_path / "again", release, "audiocraft")
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        same(theirs / file, again / file)
        assert (again / file).stat().st_size < 1.05 * (theirs / file).stat().st_size


@NEEDS_SHARED
def test_the_references_files_round_trip(tmp_path):
    release = to(tmp_path / "release", SHARED / "published_form")
    again = to(tmp_path / "again", release, "audiocraft")
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        same(SHARED / "published_form" / file, again / file)


@NEEDS_SHARED
def test_the_references_own_configurations_and_pointer_are_read(tmp_path):
    from magnet_train.codec.encodec_names import transformers_config

    for name in CODECS:
        texts = (
            (SHARED / "encodec_tiny" / f"{name}_xp_cfg.yaml").read_text(),
            codec_package(name)["xp.cfg"],
        )
        real, cut_down = (transformers_config(read_config(text, SHARED), name) for text in texts)
        assert real == cut_down
    file = "compression_state_dict.bin"
    pointer = read_package(SHARED / "published_form_pointer" / file)
    source = write_audiocraft(tmp_path / "theirs", codec=pointer)
    with pytest.warns(UserWarning, match="refers to a codec"):
        release = to(tmp_path / "release", source)
    again = to(tmp_path / "again", release, "audiocraft")
    same(SHARED / "published_form_pointer" / file, again / file)


@torch.no_grad()
def test_a_converted_model_computes_the_references_logits(tmp_path, parity):
    to(tmp_path / "release", write_audiocraft(tmp_path / "theirs", torch.float32))
    trained = SavedModel.open(tmp_path / "release")
    network, data = trained.build(), load_file(FIXTURES / "lm_tiny" / "forward.safetensors")
    tokens = data["cond.mask"].bool()
    for row in range(len(tokens)):  # each alone, so that no padding is attended to
        if tokens[row].any() and not tokens[row].all():
            continue  # the reference attends to its padding: test_model compares that
        count = max(int(tokens[row].sum()), 1)
        one = slice(row, row + 1)
        text = network.encode_text(data["cond.t5_hidden"][one, :count], tokens[one, :count])
        for stage in range(4):
            codes = data[f"T50.stage{stage}.tokens"][one]
            logits = network(codes, network.config.stage(stage), text)
            assert (logits - data[f"T50.stage{stage}.logits"][one]).abs().max() < 2e-5
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


def test_a_model_trained_here_is_exported_for_audiocraft(t5, tmp_path):
    make_codec(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec"))
    network = Magnet(MagnetConfig(dim=32, num_heads=2, num_layers=2, text_dim=768))
    decoding = DecodingConfig(decoding_steps=(3, 2, 2, 2), span_scoring="prod", top_p=0.8)
    Generator(network, codec, load_text_encoder(t5), decoding, 2.5).save(tmp_path / "ours")
    to(tmp_path / "theirs", tmp_path / "ours", "audiocraft", text_encoder="t5-base")
    package = torch.load(tmp_path / "theirs" / "state_dict.bin", weights_only=True)
    # Read by audiocraft's loader (models/loaders.py, models/builders.py), but not by ours.
    assert read_config(package["xp.cfg"], Path("x")).keys() >= {
        "solver",
        "attribute_dropout",
        "compression_model_checkpoint",
        "transformer_lm.memory_efficient",
    }
    to(tmp_path / "back", tmp_path / "theirs", text_encoder=t5, licence="mit")
    back = SavedModel.open(tmp_path / "back")
    assert back.decoding == decoding and back.crop_s == 2.5 and back.provenance["licence"] == "mit"
    assert back.codec["hash"] == codec.facts.hash and back.network == network.config
    for key, value in back.weights().items():
        assert torch.equal(value, network.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", (0.9, 0.8)), ("max_cfg_coef", (1.0, 3.0)), ("min_cfg_coef", (1.0, 2.0))],
)
def test_settings_per_stage_are_refused_for_audiocraft(t5, tmp_path, name, value):
    make_codec(tmp_path / "codec")
    network = Magnet(MagnetConfig(dim=32, num_heads=2, num_layers=2, text_dim=768))
    decoding = DecodingConfig(**{name: value})
    codec, text_encoder = load_codec(str(tmp_path / "codec")), load_text_encoder(t5)
    Generator(network, codec, text_encoder, decoding, 2.5).save(tmp_path / "ours")
    with pytest.raises(
        UserError, match=rf"{name}=\[{value[0]}, {value[1]}\]: audiocraft has one number"
    ):
        to(tmp_path / "theirs", tmp_path / "ours", "audiocraft", text_encoder="t5-base")


def test_a_pointer_stays_a_pointer_and_is_looked_at_later(t5, tmp_path):
    settings = model_settings()
    settings["transformer_lm"]["card"] = 64
    pointer = {"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.4.0a2"}
    theirs = write_audiocraft(tmp_path / "theirs", settings=settings, codec=pointer)
    with pytest.warns(UserWarning, match="refers to a codec that cannot be loaded now"):
        release = to(tmp_path / "release", theirs)
    assert SavedModel.open(release).codec["id"] == "facebook/encodec_32khz"
    assert not (release / "codec").exists()
    again = to(tmp_path / "again", release, "audiocraft")
    same(theirs / "compression_state_dict.bin", again / "compression_state_dict.bin")
    # A local copy can be given instead.
    read_codec(codec_package(), tmp_path / "codec", Path("x.bin"))
    to(tmp_path / "with", theirs, codec=str(tmp_path / "codec"), text_encoder=t5)
    assert magnet_train.load(tmp_path / "with").codec.facts.num_codebooks == 4


def fit(run: Path, shards: Path, *options: str) -> int:
    """Trains without generating; a validation at the end."""
    data = f"--data.train {shards} --data.validation {shards} --data.num_workers 0"
    quick = (
        "--generation.num_prompts 0 --trainer.accelerator cpu --trainer.logger false "
        "--model.optimizer.warmup_steps 0 --data.global_batch_size 4 --data.batch_size 2"
    )
    folder = f"--trainer.default_root_dir={run}"
    return main(["fit", *data.split(), *quick.split(), folder, *options])


def test_a_release_generates_and_is_fine_tuned_under_its_licence(t5, theirs, tmp_path, capsys):
    release = tmp_path / "release"
    assert main(["convert", str(theirs), "--out", str(release), "--text_encoder", t5]) == 0
    audio = magnet_train.load(str(release)).generate(["slow piano"], seed=1, duration_s=0.6)
    assert audio.wav.shape == (1, 1, 19_200) and audio.sample_rate == 32_000
    shards = write_shards(tmp_path / "shards", str((release / "codec").resolve()), [4, 4])
    run = tmp_path / "run"
    options = (
        f"--model.init_from {release} --trainer.max_steps 3 --trainer.val_check_interval 3 "
        "--averaging.every_n_steps 1"
    )
    assert fit(run, shards, *options.split()) == 0
    assert "global batch of 4 = 1 devices x 2 examples x 2 accumulated" in capsys.readouterr().out
    tuned, start = SavedModel.open(run), SavedModel.open(release)
    assert tuned.network == start.network and tuned.crop_s == 1.0 and tuned.guidance_dropout == 0.25
    assert tuned.provenance["step"] == 3 and tuned.decoding == start.decoding
    before = start.weights()
    assert not any(torch.equal(v, before[k].float()) for k, v in tuned.weights().items())
    to(tmp_path / "tuned", run)
    assert "license: cc-by-nc-4.0" in (tmp_path / "tuned" / "README.md").read_text()
    assert (tmp_path / "tuned" / "codec" / "config.json").is_file()
    with pytest.raises(UserError, match="derived weights must keep"):
        to(tmp_path / "freed", run, licence="mit")


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
    to(tmp_path / "a", "demo", push_to_hub="me/music")
    assert calls == ["me/music", ["README.md", "config.json", "model.safetensors"]]
    with pytest.raises(UserError, match=r"nobody/x: 401 Unauthorized; the release is in .*b"):
        to(tmp_path / "b", "demo", push_to_hub="nobody/x")


# --- bad input ------------------------------------------------------------------------------------


def test_mistakes_in_the_options_are_named(tmp_path, theirs, release):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for source, options, message in (
        (theirs, {"out": tmp_path / "full"}, "not an empty folder"),
        (theirs, {"to": "audiocraft"}, "is already an audiocraft model"),
        (theirs, {"codec": "demo"}, "4 codebooks of 256 entries, but the model has 4 of 64"),
        (tmp_path / "nowhere", {}, "not a file, folder or hub id"),
        ("facebook/magnet-none", {}, "not found locally or on the Hugging Face Hub"),
        ("magnet-small-10secs", {}, "facebook/magnet-small-10secs: not found"),
        ("demo", {"to": "audiocraft"}, "options that audiocraft lacks: context, positions, conv"),
        ("demo", {"codec": str(release / "codec")}, "4 codebooks of 64 entries"),
        ("demo", {"text_encoder": "t5-large"}, "'t5-large' has 1024"),
        ("demo", {"push_to_hub": "a/b/c"}, "give USER/NAME"),
        ("demo", {"out": tmp_path / "full" / "note.txt" / "x"}, "cannot be created"),
    ):
        with pytest.raises(UserError, match=message):
            to(source=source, **({"out": tmp_path / "x"} | options))
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    with pytest.raises(UserError, match="an audiocraft model; convert it first: magnet_train conv"):
        magnet_train.load(str(theirs))


def test_a_release_carries_nothing_but_its_codec_out_of_a_folder(tmp_path, release):
    (release / "codec" / "diary.txt").write_text("mine")
    copy = to(tmp_path / "copy", release)
    names = {p.name for p in (copy / "codec").iterdir()}
    assert names == {"config.json", "model.safetensors", "audiocraft.yaml", "README.md"}
    assert "license: cc-by-nc-4.0" in (copy / "codec" / "README.md").read_text()
    for name in ("./../secret", str(tmp_path), "../secret", "./codec/../../secret"):
        config = json.loads((release / "config.json").read_text())
        config["codec"]["id"] = name
        (release / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="neither in the release's folder"):
            SavedModel.open(release)


def test_a_codec_that_is_not_the_recorded_one_is_refused_everywhere(tmp_path, release):
    read_codec(codec_package(pad_mode="reflect"), release / "codec", Path("x.bin"))
    network, codec = SavedModel.open(release).network, str(release / "codec")
    for attempt in (
        lambda: magnet_train.load(str(release)),
        lambda: to(tmp_path / "again", release),
        lambda: MagnetModule(network, codec=codec, init_from=str(release)),
    ):
        with pytest.raises(UserError, match="codec mismatch"):
            attempt()
    assert not (tmp_path / "again").exists()


def test_a_folder_called_with_an_at_is_a_folder(tmp_path):
    source = write_audiocraft(tmp_path / "me@home")
    release = to(tmp_path / "my@4", source)
    assert (to(tmp_path / "copy@2", release) / "codec" / "config.json").is_file()
    again = to(tmp_path / "b", release, "audiocraft")
    same(source / "state_dict.bin", again / "state_dict.bin")


def test_settings_that_changed_go_back_changed(tmp_path, release):
    config = json.loads((release / "config.json").read_text())
    config["decoding"]["temperature"], config["crop_s"] = 1.5, 2.0
    (release / "config.json").write_text(json.dumps(config))
    back = to(tmp_path / "again", release, "audiocraft", text_encoder="google/flan-t5-base")
    package = torch.load(back / "state_dict.bin", weights_only=True)
    again = read_config(package["xp.cfg"], tmp_path)
    assert again["generate.lm.temp"] == 1.5 and again["dataset.segment_duration"] == 2
    assert again["conditioners.description.t5.name"] == "google/flan-t5-base"


def test_a_run_resumes_without_the_release_it_started_from(t5, tmp_path, release):
    read_codec(codec_package(), tmp_path / "codec", Path("x.bin"))
    shards = write_shards(tmp_path / "shards", str(tmp_path / "codec"), [4, 4])
    run = tmp_path / "run"
    parts = ("--model.codec", str(tmp_path / "codec"), "--model.text_encoder", t5)
    steps = ("--trainer.val_check_interval=2", "--trainer.max_steps=2")
    assert fit(run, shards, f"--model.init_from={release}", *parts, *steps) == 0
    release.rename(tmp_path / "moved")
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    options = (f"--config={run / 'config.yaml'}", *parts, *steps[:1], "--trainer.max_steps=4")
    assert fit(run, shards, *options, checkpoint) == 0
    about = SavedModel.open(run).provenance
    assert about["step"] == 4 and about["licence"] == "cc-by-nc-4.0"
    # Options override the checkpoint.
    data = (f"--data.train={shards}", f"--data.validation={shards}", "--trainer.logger=false")
    own = f"--model.codec={tmp_path / 'nowhere'}"
    assert main(["validate", *data, checkpoint, own]) == 2
