"""`evaluate` from the command line, on real and degraded clips, with one-line errors."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers_errors import refusal
from helpers_programs import LONGEST_S

from magnet_train.__main__ import main
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.evaluation.evaluate import EvaluateOptions, evaluate
from magnet_train.metrics.record import compare, read_records

SECONDS = 4


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The first seconds of eight of the demo's clips, with captions."""
    folder = tmp_path_factory.mktemp("real")
    for path in sorted(p for p in demo_path("clips").iterdir() if p.suffix in (".flac", ".mp3"))[
        :8
    ]:
        wav, rate = soundfile.read(path, frames=SECONDS * 44_100)
        soundfile.write(folder / f"{path.stem}.wav", wav[: SECONDS * rate], rate)
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def damaged(real: Path, folder: Path, damage) -> Path:
    """Copies with changed samples (`t` or `t channels`) and the same captions."""
    folder.mkdir()
    for path in real.glob("*.wav"):
        wav, rate = soundfile.read(path)
        soundfile.write(folder / path.name, damage(wav, rate), rate)
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def noise(level: float):
    return lambda wav, rate: wav + level * np.random.default_rng(0).standard_normal(wav.shape)


def low_pass(wav, rate):
    from scipy.signal import butter, sosfiltfilt

    return sosfiltfilt(butter(8, 900, fs=rate, output="sos"), wav, axis=0)


def test_a_table_records_a_report_and_a_listening_test_through_the_command_line(
    real, tmp_path, capsys
):
    bad = damaged(real, tmp_path / "noisy", noise(0.1))
    metrics = "fad/musicnn kl/musicnn text/musicnn text_shuffled/musicnn kad/musicnn"
    args = (
        f"evaluate --generated same={real} {bad} --reference {real} --out {tmp_path}/r.json "
        f"--metrics {metrics} --save-reference {tmp_path}/reference --loudness false "
        f"--report {tmp_path}/report.html --listening-test {tmp_path}/listen.html --accelerator cpu"
        " --codec demo"
    )
    assert main(args.split()) == 0
    printed = capsys.readouterr().out
    assert "| same " in printed and "| noisy " in printed and "below 250" in printed
    records = {(r.system, r.metric): r for r in read_records(tmp_path / "r.json")}
    same, noisy = (records[name, "fad/musicnn"] for name in ("same", "noisy"))
    assert same.value == pytest.approx(0, abs=1e-6) and noisy.value > 5
    assert (
        same.protocol == noisy.protocol
        and same.num_clips == 8
        and len(same.reference_hash or "") == 16
    )
    assert (
        same.resampler == "soxr VHQ" and 44_100 in same.sample_rates and noisy.interval is not None
    )
    assert noisy.baseline_real is not None and noisy.baseline_real > 0
    assert records["same", "kl/musicnn"].value == pytest.approx(0, abs=1e-4)
    assert (
        records["same", "text/musicnn"].value > records["same", "text_shuffled/musicnn"].value + 0.1
    )
    report = (tmp_path / "report.html").read_text()
    assert "noisy" in report and (tmp_path / "listen_key.json").exists()
    assert report.count("<audio") == 8 * 4  # both systems, real clips, real ones through the codec
    assert "real, through the codec" in report and "Codec (ceiling)" in report
    assert "noisy" not in re.sub(r'src="data:[^"]*"', "", (tmp_path / "listen.html").read_text())
    # The saved statistics give the same values without the audio.
    again = (
        f"evaluate --generated {bad} --reference {tmp_path}/reference --out {tmp_path}/s.json "
        "--metrics fad/musicnn kl/musicnn kad/musicnn --loudness false --accelerator cpu"
    )
    assert main(again.split()) == 0
    for record in read_records(tmp_path / "s.json"):
        assert record.value == pytest.approx(records["noisy", record.metric].value, rel=1e-9)


def test_a_ladder_of_damage_comes_out_in_order(real, tmp_path):
    """Distances increase from real clips over codec, low-pass and noisy clips to white noise; the
    first and last intervals do not overlap."""
    steps = {
        "real": real,
        "low-passed": damaged(real, tmp_path / "low", low_pass),
        "noisy": damaged(real, tmp_path / "noisy", noise(0.3)),
        "white noise": damaged(
            real, tmp_path / "white", lambda w, rate: 0.3 * noise(1)(0 * w, rate)
        ),
    }
    options = EvaluateOptions(
        [f"{name}={folder}" for name, folder in steps.items()],
        str(real),
        metrics=["fad/musicnn", "kl/musicnn"],
        codec="demo",
        accelerator="cpu",
    )
    records = evaluate(options)
    fads = {r.system: r for r in records if r.metric == "fad/musicnn"}
    for r in records:
        print(f"{r.metric:<12} {r.system:<12} {r.value:8.3f} {r.interval}")
    codec = fads["real"].baseline_codec
    assert codec is not None and fads["real"].value < codec < fads["low-passed"].value
    assert fads["low-passed"].value < fads["noisy"].value < fads["white noise"].value
    kls = {r.system: r.value for r in records if r.metric == "kl/musicnn"}
    assert kls["real"] < kls["low-passed"] < kls["noisy"] < kls["white noise"]
    low, high = fads["real"].interval, fads["white noise"].interval
    assert low is not None and high is not None and low[1] < high[0]


def test_a_model_is_generated_for_and_scored_in_one_go(tmp_path, tiny, real):
    tiny.save(tmp_path / "release", "")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a slow waltz\ntwo flutes\n\na banjo\n")
    options = EvaluateOptions(
        checkpoint=str(tmp_path / "release"),
        prompts=prompts,
        generated_to=tmp_path / "out",
        reference=str(real),
        metrics=["fad/musicnn", "text/musicnn"],
        report=tmp_path / "report.html",
        batch_size=2,
        accelerator="cpu",
    )
    with pytest.raises(
        UserError, match=r"a-slow-waltz_\w+\.wav: .* too short for musicnn.*remove or replace it"
    ):
        evaluate(options)  # the tiny model makes seconds
    tiny.crop_s, before = 3.2, tiny.crop_s
    try:
        shutil.rmtree(tmp_path / "release")
        tiny.save(tmp_path / "release", "")
        records = evaluate(options, {"temperature": 2.0})
    finally:
        tiny.crop_s = before
    assert {r.metric: r.num_clips for r in records} == {"fad/musicnn": 3, "text/musicnn": 3}
    assert (
        records[0].decoding is not None
        and records[0].decoding["temperature"] == 2.0
        and records[0].seed == 0
    )
    folders = sorted(len(list(folder.glob("*.wav"))) for folder in (tmp_path / "out").iterdir())
    assert folders == [1, 3]  # one folder for each setting; the first stopped at its first clip
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_a_reference_is_known_by_its_audio_and_not_by_its_names(real, tmp_path):
    other = damaged(real, tmp_path / "other", noise(0.1))
    options = {"metrics": ["fad/musicnn"], "loudness": False, "accelerator": "cpu"}
    (one,), (two,) = (
        evaluate(EvaluateOptions([f"x={real}"], str(r), **options)) for r in (real, other)
    )
    assert one.reference_hash != two.reference_hash
    with pytest.raises(UserError, match="differs in reference_hash"):
        compare([one, two])


def test_what_must_fail_does_so_before_anything_is_generated(tmp_path, tiny, real):
    tiny.save(tmp_path / "release", "")
    (tmp_path / "p.txt").write_text("a waltz\n")
    common = {
        "checkpoint": str(tmp_path / "release"),
        "prompts": tmp_path / "p.txt",
        "generated_to": tmp_path / "out",
    }
    for options, message in (
        (
            {"reference": str(real)},
            "kl/musicnn: clip a-waltz_.* has no counterpart in the reference",
        ),
        ({}, "fad/musicnn needs --reference"),
        (
            {"metrics": ["vendi/musicnn"], "codec": "demo"},
            "--codec: its baseline needs the reference as audio",
        ),
        (
            {"metrics": ["vendi/musicnn"], "generated": [str(real)], "captions": Path("gone.csv")},
            "gone.csv: unreadable",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(EvaluateOptions(**common, **options, accelerator="cpu"))
    assert not (tmp_path / "out").exists()


def refused(*folders: Path, **options: Any) -> str:
    generated = [str(folder) for folder in folders]
    return refusal(evaluate, EvaluateOptions(generated, **({"accelerator": "cpu"} | options)))


def test_figures_are_written_even_where_a_table_is_refused(real, tmp_path):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(real.glob("*.wav"))[:6]:
        shutil.copy(path, fewer)
    options = {"metrics": ["fad/musicnn"], "out": tmp_path / "r.json"}
    assert "differs in num_clips, 8 and 6" in refused(real, fewer, reference=str(real), **options)
    assert len(read_records(tmp_path / "r.json")) == 2


@pytest.mark.slow
def test_two_processes_on_the_command_line_give_the_same_figure(python, real, tmp_path):
    """A launch with two ranks; an unreadable clip stops both with its message."""
    command = [python, "-m", "magnet_train", "evaluate", "--reference", str(real)]
    command += "--accelerator cpu --metrics fad/musicnn kl/musicnn --devices".split()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def run(devices: int, generated: Path) -> subprocess.CompletedProcess:
        options = [str(devices), "--generated", str(generated)]
        options += ["--out", str(tmp_path / f"{devices}.json")]
        return subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, timeout=LONGEST_S
        )

    noisy = damaged(real, tmp_path / "noisy", noise(0.1))
    for devices in (1, 2):
        done = run(devices, noisy)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, shared = (read_records(tmp_path / f"{devices}.json") for devices in (1, 2))
    assert [r.value for r in shared] == pytest.approx([r.value for r in alone], rel=1e-9)
    assert shared[0].protocol == alone[0].protocol and shared[0].interval == pytest.approx(
        alone[0].interval
    )
    name = sorted(noisy.glob("*.wav"))[1].name  # the second rank's
    (noisy / name).write_bytes(b"RIFF but no wave")
    done = run(2, noisy)
    assert done.returncode == 2 and f"error: rank 1: {noisy / name}: unreadable" in done.stderr, (
        done.stderr[-2000:]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(64_000), "silent; .*--keep_silent true"),
        (0.1 * np.ones(16_000), ".*too short for musicnn"),
        (np.full(64_000, np.nan), "has NaN or infinite samples"),
        (np.zeros(0), "empty"),
        (b"RIFF but no wave", "unreadable"),
    ],
)
def test_a_clip_that_cannot_be_scored_ends_it_and_is_named(tmp_path, real, content, message):
    folder = tmp_path / "generated"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / "bad.wav").write_bytes(content)
    else:
        soundfile.write(folder / "bad.wav", content, 16_000, "FLOAT")
    assert re.search(rf"bad\.wav: {message}", refused(folder, metrics=["vendi/musicnn"]))


def test_a_figure_without_meaning_is_an_error(tmp_path, real):
    one = tmp_path / "one"
    one.mkdir()
    path = next(iter(sorted(real.glob("*.wav"))))
    shutil.copy(path, one)
    # One window of musicnn's.
    soundfile.write(one / path.name, soundfile.read(path, frames=3 * 44_100)[0], 44_100)
    said = refused(one, reference=str(one), metrics=["fad/musicnn"])
    assert re.search("at least two .*windows", said)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(path, other / "unheard-of.wav")
    said = refused(other, reference=str(real), metrics=["kl/musicnn"])
    assert "kl/musicnn: clip unheard-of has no counterpart in the reference" in said
    said = refused(other, metrics=["text/musicnn"])
    assert "text/musicnn: clip unheard-of has no caption; give --captions" in said


def test_mistakes_in_the_options_are_named(tmp_path, monkeypatch):
    for options, message in (
        ({"metrics": ["fad/nobody"]}, "metric 'fad/nobody': give METRIC/EMBEDDER"),
        ({"metrics": ["kl/vggish"]}, "KL needs a classifier"),
        ({"metrics": ["text/vggish"]}, "embed captions"),
        ({"generated": []}, "nothing to score"),
        ({"checkpoint": "demo"}, "--checkpoint and --prompts belong together"),
        ({"weights": {"x": "y"}}, "--weights x: choose from"),
        ({"published_set": "Jazz"}, "--published_set Jazz: choose MusicCaps"),
        ({"save_reference": tmp_path}, "--save_reference: needs --reference"),
        ({"kl_convention": "mine"}, "--kl_convention mine: choose from audiocraft"),
        ({"out": tmp_path}, "--out .*: is a folder; give a file name"),
        ({"report": Path("/proc/x/y.html")}, "--report /proc/x: cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluateOptions(**({"generated": [str(tmp_path)]} | options))
    said = refused(tmp_path, metrics=["vendi/musicnn"], accelerator="banana")
    assert re.search("--accelerator banana --devices 1: .*; choose cpu, gpu or auto", said)
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    assert "fad/musicnn needs --reference" in refused(tmp_path)
    said = refused(tmp_path, metrics=["vendi/musicnn"], weights={"musicnn": "x"})
    assert "weights x of musicnn: its weights are bundled" in said
    # Weights that are not there, and no network: an error here, with all that is needed to get
    # them.
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    said = refused(tmp_path, metrics=["vendi/vggish"])
    assert "VGGish weights: not in the cache, and HF_HUB_OFFLINE is set" in said
    wrong = tmp_path / "vggish.pth"
    torch.save({}, wrong)
    said = refused(tmp_path, metrics=["vendi/vggish"], weights={"vggish": str(wrong)})
    assert re.search(r"vggish\.pth: SHA-256 is .*, not 10086976 as published", said)


def chord(i: int) -> np.ndarray:
    t = np.arange(SECONDS * 16_000) / 16_000
    notes = [110 * 2 ** (k * (i + 3) / 12) for k in range(1, 5)]
    return 0.1 * sum(np.sin(2 * np.pi * hz * t) for hz in notes)


def test_mono_and_two_equal_channels_in_folders_with_an_equals_sign(tmp_path):
    """Mono and two equal channels have the same metrics and protocol, normalised or not."""
    for i in range(4):
        for name, channels in (("span_len=1", 1), ("span_len=2", 2)):
            (tmp_path / name).mkdir(exist_ok=True)
            wav = np.repeat(chord(i)[:, None], channels, 1)
            soundfile.write(tmp_path / name / f"c{i}.wav", wav, 16_000, "FLOAT")
        (tmp_path / "real").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "real" / f"c{i}.wav", chord(i + 1), 16_000)
    for loudness in (True, False):
        records = evaluate(
            EvaluateOptions(
                [str(tmp_path / "span_len=1"), f"two={tmp_path / 'span_len=2'}"],
                str(tmp_path / "real"),
                metrics=["fad/musicnn", "kl/musicnn"],
                loudness=loudness,
                accelerator="cpu",
            )
        )
        found = {(r.system, r.metric): r for r in records}
        for metric in ("fad/musicnn", "kl/musicnn"):
            mono, stereo = found["span_len=1", metric], found["two", metric]
            assert mono.value == pytest.approx(stereo.value, rel=1e-5)
            assert mono.protocol == stereo.protocol
            assert mono.clipped_share == stereo.clipped_share


def test_a_listening_test_takes_the_captions_that_scoring_takes(tmp_path, real):
    """Generated clips without captions use those of the real clips; missing ones are reported."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(real.glob("*.wav"))[:3]:
        shutil.copy(path, bare)
    options = {"metrics": ["vendi/musicnn"], "listening_test": tmp_path / "t.html"}
    assert re.search(r"c\d?.*: no caption|bare.*: no caption", refused(bare, **options))
    said = refused(bare, reference=str(real), **options)
    assert "system bare: no clip for 5 of 8 captions" in said
    for path in sorted(real.glob("*.wav")):
        shutil.copy(path, bare)
    evaluate(EvaluateOptions([str(bare)], str(real), accelerator="cpu", **options))
    key = json.loads((tmp_path / "t_key.json").read_text())
    anchors = ["anchor: low-pass 3.5 kHz", "anchor: other caption"]
    assert key["systems"] == ["bare", "reference", *anchors]
