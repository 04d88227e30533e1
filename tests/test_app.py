"""The app: what its page calls, without a browser; gradio is only needed for the last tests."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import soundfile

from magnet_train.__main__ import main
from magnet_train.app.access import Access
from magnet_train.app.fields import form_fields, from_form, to_form
from magnet_train.app.studio import NO_JUDGE, Studio, edit_options, read_options
from magnet_train.cli.generate import GenerateOptions
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.hints import Hints
from magnet_train.release import SavedModel

SHORT = asdict(SavedModel.open("demo").decoding) | {"decoding_steps": (2, 1)}
ASKED = {"prompt": ["a slow air"], "seed": 3, "duration_s": 1.0, "decoding": SHORT}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    return Studio("demo", [folder / "allowed"], folder / "out", "cpu")


@pytest.fixture
def recording(studio):
    """Two seconds of noise in an allowed folder."""
    path = studio.out.parent / "allowed" / "noise.wav"
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (2 * 16_000, 2))
    soundfile.write(path, noise, 16_000, "PCM_24")
    return path


def test_takes_with_scores_and_the_json_that_makes_them_again(studio, tmp_path, capsys):
    updates = list(studio.generate("tab", 2, "music/periodicity", ASKED))
    clips = [update.clip for update in updates if update.clip]
    assert [clip.path.name[-9:] for clip in clips] == ["seed3.wav", "seed4.wav"]
    assert all(clip.note.startswith("music/periodicity ") for clip in clips)
    assert clips[0].order.shape[0] == 5 and updates[-1].message == "Done: 2 files saved"

    note = clips[1].path.with_suffix(".json")
    assert main(["generate", "--config", str(note), "--out", str(tmp_path)]) == 0
    assert (tmp_path / clips[1].path.name).read_bytes() == clips[1].path.read_bytes()
    again = list(studio.generate("tab", 1, "text/musicnn", read_options(note)))
    assert again[-2].clip.note.startswith("no score: ")  # too short for it
    assert again[-2].clip.path != clips[1].path  # an older take is not replaced
    assert again[-2].clip.path.read_bytes() == clips[1].path.read_bytes()


def test_an_edit_keeps_what_is_outside_its_regions(studio, recording, tmp_path):
    asked = edit_options("regenerate", "0.5:1") | {"audio": recording, "decoding": SHORT}
    clip = list(studio.edit("tab", asked))[-2].clip
    before, _ = soundfile.read(recording)
    after, _ = soundfile.read(clip.path)
    changed = np.flatnonzero((before != after).any(1)) / 16_000
    assert changed.min() >= 0.5 - 0.04 and changed.max() <= 1 + 0.04 and len(changed) > 4_000
    assert clip.regions == [[0.48, 1.0]] or np.allclose(clip.regions, [[0.5, 1]], atol=0.04)
    note = clip.path.with_suffix(".json")
    assert main(["edit", "--config", str(note), "--out", str(tmp_path)]) == 0
    assert (tmp_path / clip.path.name).read_bytes() == clip.path.read_bytes()


def test_cancel_and_two_tabs(studio):
    long = ASKED | {"decoding": SHORT | {"decoding_steps": (3_000,)}}
    first = studio.generate("first", 1, NO_JUDGE, long)
    while not next(first).picture:
        pass
    second = studio.generate("second", 1, NO_JUDGE, ASKED)
    assert next(second).message == "Waiting for another generation to end"
    assert studio.cancel("third") == "Nothing is running"
    studio.cancel("first")
    *_, last = first
    assert last.message.startswith("Cancelled after step ")
    assert list(second)[-1].message == "Done: 1 file saved"
    closed = studio.generate("first", 1, NO_JUDGE, long)  # the tab is closed
    next(closed)
    closed.close()
    assert list(studio.generate("second", 1, NO_JUDGE, ASKED))[-1].message.startswith("Done")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"checkpoint": "/nowhere/model"}, "outside the allowed folders"),
        ({"checkpoint": "someone/model"}, "outside the allowed folders"),
        ({"lora": ["/etc:0.5"]}, "outside the allowed folders"),
        ({"decoding": {"rescorer": "/nowhere"}}, "outside the allowed folders"),
        ({"decoding": {"top_p": 2.0}}, "top_p"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"continue_from": "/etc/passwd"}, "outside the allowed folders"),
        ({"audio": "/etc/passwd"}, "outside the allowed folders"),
        ({"audio": "OUT/missing.wav"}, "no such file"),
        ({"audio": "OUT/link.wav"}, "outside the allowed folders"),
        ({"checkpoint": "OUT/missing"}, "no such model"),
        ({"checkpoint": "OUT/linked"}, "outside the allowed folders"),
        ({"checkpoint": "OUT/presets"}, "no config.json"),
    ],
)
def test_refused_in_one_line(studio, options, says):
    link, outside = studio.out / "link.wav", studio.out.parent / "outside.wav"
    outside.touch()
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    (studio.out / "presets").mkdir(exist_ok=True)
    if not (studio.out / "linked").exists():
        (studio.out / "linked").mkdir()
        (studio.out / "linked" / "codec").symlink_to("/etc")
    own = {
        name: value.replace("OUT", str(studio.out)) if isinstance(value, str) else value
        for name, value in options.items()
    }
    run = studio.edit if "audio" in own else lambda tab, o: studio.generate(tab, 1, NO_JUDGE, o)
    with pytest.raises(UserError, match=says) as refusal:
        list(run("tab", {"prompt": ["x"]} | own))
    assert "\n" not in str(refusal.value)


def test_recordings(studio, recording, tmp_path):
    upload = tmp_path / "my take.WAV"
    upload.write_bytes(recording.read_bytes())
    kept = studio.add_recording(str(upload))
    assert kept.is_relative_to(studio.out) and kept.read_bytes() == upload.read_bytes()
    assert studio.open_recording(str(kept)) == kept
    upload.write_text("no audio")
    with pytest.raises(UserError, match=r"my take\.WAV"):
        studio.add_recording(str(upload))


def test_presets_are_configurations_of_generate(studio):
    path = studio.save_preset("../fast one", ASKED)
    assert path.parent == studio.out / "presets" and studio.presets() == [path.stem]
    assert studio.preset(path.stem)["decoding"]["decoding_steps"] == [2, 1]
    assert studio.preset(path.stem)["prompt"] == ["a slow air"]
    for wrong in ("../../etc/passwd", "missing"):
        with pytest.raises(UserError, match="no such preset"):
            studio.preset(wrong)
    for options in (
        {"decoding": {"nonsense": 1}},
        {"decoding": {"top_p": "nonsense"}},
        {"decoding": {}, "prompt": "nonsense"},
        {"decoding": {}, "lora": 5, "loop": "nonsense"},
        {"decoding": {}, "seed": "nonsense"},
    ):
        path.write_text(json.dumps({"options": options}))
        with pytest.raises(UserError, match=path.name):
            studio.preset(path.stem)
    path.unlink()


def test_help_of_the_form_names_fields_and_not_options():
    helps = {field.name: field.help for field in form_fields(GenerateOptions)}
    assert helps["loop"] == "Generate seamless loops of length duration_s."


@pytest.mark.parametrize("settings", [DecodingConfig, Hints])
def test_settings_survive_the_form(settings):
    fields = form_fields(settings)
    assert all(field.help.endswith(".") for field in fields)
    assert settings(**from_form(settings, to_form(asdict(settings())))) == settings()


def test_values_of_the_form():
    def read(**values):
        return next(iter(from_form(DecodingConfig, values).values()))

    assert read(decoding_steps="20 10,5") == (20, 10, 5) and read(decoding_steps="7") == (7,)
    assert read(rescorer_weight="0.5") == 0.5 and read(rescorer_weight="0.5, 1") == (0.5, 1.0)
    assert read(rescorer=" ") is None and read(rescore_stages="0, 2") == (0, 2)
    for name, value in (("top_p", None), ("decoding_steps", "2.5"), ("rescorer_weight", "a")):
        with pytest.raises(UserError, match=name):
            from_form(DecodingConfig, {name: value})


def test_validation_clips_of_a_run(studio, recording):
    run = studio.out.parent / "allowed" / "run"
    for step in (5, 10):
        folder = run / "validation" / f"step_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "00_x.wav").write_bytes(recording.read_bytes())
        (folder / "00_x.json").write_text(json.dumps({"prompt": "<b>air", "score": 2.5}))
    assert studio.access.list_runs() == [str(run)]
    assert studio.steps_of_run(str(run)) == [10, 5]
    html = studio.run_html(str(run), [5, 10], 4)
    assert html.count("<clip-view") == 2 and "&lt;b&gt;air" in html and "FAD 2.5" in html
    assert html.index("step 5<") < html.index("step 10<")
    assert studio.run_html(str(run), [10], 4).count("<clip-view") == 1
    with pytest.raises(UserError, match="outside"):
        studio.steps_of_run("/")


def test_models_in_allowed_folders():
    access = Access((demo_path("magnet").parent,))
    assert access.list_models()[0] == "demo"
    assert str(demo_path("magnet")) in access.list_models()
    assert access.model(f"{demo_path('magnet')}@raw").endswith("magnet@raw")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "/nowhere/model"], "nowhere/model"),
        (["--port", "0"], "port"),
        (["--allow", __file__], "not a folder"),
        (["--device", "gpu"], "--device gpu: choose"),
    ],
)
def test_refused_at_the_start(args, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert main(["app", "--out", str(tmp_path), *args]) == 2
    assert says in capsys.readouterr().err


def test_without_gradio(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install -e '.[app]'" in capsys.readouterr().err.splitlines()[-1]


def test_the_page_holds_a_clips_options(studio, recording):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
    from magnet_train.app.page import Page

    page = Page(studio)
    form = page._to_form(ASKED | {"checkpoint": "demo", "lora": ["a:0.8", "b"]})
    options = page._options(form)
    assert {name: options[name] for name in ASKED} == ASKED | {"decoding": options["decoding"]}
    assert DecodingConfig(**options["decoding"]) == DecodingConfig(**SHORT)
    assert options["lora"] == ["a:0.8", "b"]
    rows = list(page._generate("tab", 1, NO_JUDGE, *form[:5], "", *form[6:]))
    assert 'data-group="takes"' in rows[-2][2]
    *_, regions, caption = page._open_path("tab", str(recording))
    assert (regions, caption) == ("", "")
    with pytest.raises(UserError, match="no recording"):
        next(page._edit("tab", "loop", []))
