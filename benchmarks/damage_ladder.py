"""Does a metric know better from worse? Real clips and the same clips damaged more and more, as a
table with intervals.

    python benchmarks/damage_ladder.py --metrics fad/musicnn kl/musicnn text/musicnn
 The 16 clips of the demo: as they are, through its codec, low-passed at 900 Hz, with noise at -20
dB of full scale, and noise alone; each against the clips themselves.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import butter, sosfiltfilt

from magnet_train.codec.base import load_codec
from magnet_train.common.assets import demo_path
from magnet_train.data.audio import read_audio
from magnet_train.evaluation.clips import list_clips
from magnet_train.evaluation.evaluate import DEFAULT_METRICS, EvaluateOptions, evaluate

RATE = 16_000


def through_codec(wav: np.ndarray) -> np.ndarray:
    codec = load_codec("demo")
    with torch.no_grad():
        return codec.decode(codec.encode(torch.from_numpy(wav).float()[None, None]))[
            0, 0, : len(wav)
        ].numpy()


def low_passed(wav: np.ndarray) -> np.ndarray:
    return sosfiltfilt(butter(8, 900, fs=RATE, output="sos"), wav)


def noisy(wav: np.ndarray) -> np.ndarray:
    return wav + 0.1 * np.random.default_rng(0).standard_normal(len(wav))


def white_noise(wav: np.ndarray) -> np.ndarray:
    return 0.1 * np.random.default_rng(1).standard_normal(len(wav))


LADDER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "real": lambda wav: wav,
    "codec": through_codec,
    "low-passed": low_passed,
    "noisy": noisy,
    "white noise": white_noise,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--metrics", nargs="+", default=list(DEFAULT_METRICS), help="METRIC/EMBEDDER each."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, damage in LADDER.items():
            (Path(folder) / name).mkdir()
            for key, clip in list_clips(demo_path("clips")).items():
                wav = damage(read_audio(clip.path, RATE, 1)[0])
                soundfile.write(Path(folder) / name / f"{key}.wav", np.clip(wav, -1, 1), RATE)
                shutil.copy(clip.path.with_suffix(".txt"), Path(folder) / name / f"{key}.txt")
        systems = [f"{name}={Path(folder) / name}" for name in LADDER]
        evaluate(
            EvaluateOptions(
                systems, str(Path(folder) / "real"), metrics=args.metrics, loudness=False
            )
        )


if __name__ == "__main__":
    main()
