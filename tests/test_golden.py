"""Ten losses and one decoded example of the demo, in git, to detect unintended changes.

make golden     # regenerates them; the commit says why
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from magnet_train.__main__ import main

GOLDEN = Path(__file__).parent / "golden"
PROMPT = "a slow chorale for string quartet in G minor"


def losses(folder: Path) -> list[float]:
    """Losses of the first ten training steps of conf/demo.yaml."""
    args = (
        f"fit --trainer.default_root_dir {folder} --trainer.max_steps 10 --generation.num_prompts 0"
    ).split()
    args += (
        "--model.optimizer.warmup_steps 5 --trainer.log_every_n_steps 1 --generation.at_start false"
    ).split()
    args += (
        "--trainer.limit_val_batches 1 --trainer.val_check_interval 10 --data.num_workers 0".split()
    )
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": ".", "name": "csv"},
    }
    args += ["--trainer.logger", json.dumps([logger])]
    args += ["--trainer.enable_progress_bar", "false"]
    assert main(args) == 0
    (table,) = folder.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in table.read_text().splitlines()]
    column = header.index("train/loss")
    return [float(row[column]) for row in rows if row[column]]


def codes() -> torch.Tensor:
    """Codes `k t` of two seconds decoded with the bundled model."""
    import magnet_train

    return magnet_train.load("demo").generate([PROMPT], seed=0, duration_s=2.0).codes[0]


def test_the_first_losses_of_the_demo_are_as_they_were(tmp_path):
    expected = json.loads((GOLDEN / "losses.json").read_text())
    measured = losses(tmp_path)
    assert len(measured) == len(expected) == 10
    assert measured == pytest.approx(expected, rel=1e-4)


def test_the_shipped_model_plays_as_it_did():
    from safetensors.torch import load_file

    expected, measured = load_file(GOLDEN / "codes.safetensors")["codes"].long(), codes()
    # Equal on the same type of CPU; on others, ties may be resolved differently.
    assert (measured == expected).float().mean() > 0.9


def renew() -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        (GOLDEN / "losses.json").write_text(json.dumps(losses(Path(folder))) + "\n")
    save_file({"codes": codes().to(torch.int16)}, GOLDEN / "codes.safetensors")


if __name__ == "__main__":
    sys.exit(renew())
