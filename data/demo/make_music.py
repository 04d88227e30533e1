"""Make the demo's music from scores, and turn it into code shards: one resumable command.

    python data/demo/make_music.py --out AUDIO                                  # scores and audio
    python data/demo/make_music.py --out AUDIO --shards SHARDS --codec CODEC    # and code shards

Options that are not listed below go to `python -m magnet_train tokenize`. Each step keeps what it
finds finished.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SPLITS = ("validation", "test", "train")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder for scores and audio; 40 hours take 5 GB."
    )
    parser.add_argument(
        "--shards", type=Path, help="Folder for code shards; none are made if not given."
    )
    parser.add_argument("--hours", type=float, default=40.0, help="Hours of training audio.")
    parser.add_argument(
        "--processes", type=int, default=1, help="Number of processes of each step."
    )
    args, tokenize_options = parser.parse_known_args()
    if tokenize_options and args.shards is None:
        parser.error(f"{' '.join(tokenize_options)}: options of tokenize need --shards")
    processes = ["--processes", str(args.processes)]

    def run(*command: str | Path) -> None:
        subprocess.run([sys.executable, *map(str, command), *processes], check=True)

    run(HERE / "scores.py", "--out", args.out / "scores")
    render = (HERE / "render.py", "--scores", args.out / "scores", "--out", args.out)
    run(*render, "--splits", "validation", "test")
    run(*render, "--splits", "train", "--hours", str(args.hours))
    for split in SPLITS if args.shards else ():
        tokenize = (
            "-m",
            "magnet_train",
            "tokenize",
            args.out / split,
            "--out",
            args.shards / split,
        )
        run(*tokenize, "--split", split, *tokenize_options)


if __name__ == "__main__":
    main()
