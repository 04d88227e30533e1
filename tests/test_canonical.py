"""The published types of codec and text encoder, selected by options, from local folders."""

import json
from pathlib import Path

import pytest
import soundfile
from make_components import make_codec, make_t5
from test_cli import fit

from magnet_train.__main__ import main
from magnet_train.common.assets import demo_path


@pytest.fixture(scope="module")
def components(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("components")
    make_codec(folder / "encodec")
    make_t5(folder / "t5")
    return {"codec": str(folder / "encodec"), "text_encoder": str(folder / "t5")}


def test_encodec_and_t5_from_tokenize_to_generate(components, tmp_path: Path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for flac in sorted(demo_path("clips").glob("*.flac"))[:3]:
        for path in (flac, flac.with_suffix(".txt")):
            (clips / path.name).write_bytes(path.read_bytes())
    for split, embedder in (("train", "none"), ("validation", "musicnn")):
        out = tmp_path / "shards" / split
        options = ["--codec", components["codec"], "--embedder", embedder]
        assert main(["tokenize", str(clips), "--out", str(out), *options]) == 0
        facts = json.loads((out / "index.json").read_text())["codec"]
        assert facts["sample_rate"] == 32_000
        assert facts["codebook_size"] == 2048
        assert facts["num_codebooks"] == 4

    run = tmp_path / "run"
    chosen = [
        f"--model.codec={components['codec']}",
        f"--model.text_encoder={components['text_encoder']}",
    ]
    longer = ["--trainer.max_steps=20", "--trainer.val_check_interval=20", "--averaging.decay=0.5"]
    assert fit(tmp_path / "shards", run, *chosen, *longer) == 0
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["val/ce"]["after"] < metrics["val/ce"]["before"]
    assert metrics["val/fad/musicnn"]["after"] > 0

    made = tmp_path / "made"
    prompt = "a slow chorale for string quartet in G minor"
    steps = ["--decoding.decoding_steps=[2,1,1,1]", "--plots=false"]
    assert (
        main(["generate", "--prompt", prompt, "--out", str(made), "--checkpoint", str(run), *steps])
        == 0
    )
    (wav,) = made.glob("*.wav")
    info = soundfile.info(wav)
    assert info.samplerate == 32_000 and info.frames == round(3.2 * 32_000)
