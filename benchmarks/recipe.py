"""What options of training are worth: one change at a time, from random weights.

    python benchmarks/recipe.py options       each option of the demo's recipe
    python benchmarks/recipe.py windows       span length and attention windows
    python benchmarks/recipe.py hybrid        weight of the hybrid's autoregressive loss
    python benchmarks/recipe.py options --table      (only rewrites table.md and plot.png)

Runs are resumed if the command is repeated. The base is conf/demo.yaml on 2.5-second, 5-second and
10-second crops with a third of the steps each, all of 20 seconds of music per step and core. Each
change is compared with the first over seeds, paired, by cross-entropy and accuracy on fixed masks.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from magnet_train.sweeps.ablation import plot, read_ablation
from magnet_train.sweeps.sweep import Run, run_here

HYBRID = ["--config=conf/demo_hybrid.yaml"]
TABLES: dict[str, dict[str, list[str]]] = {
    "options": {
        "recipe": [],
        "positions sinusoidal": ["--model.network.positions=sinusoidal"],
        "positions rotary": ["--model.network.positions=rotary"],
        "no convolution": ["--model.network.convolution=0"],
        "rate 4e-3": ["--model.optimizer.lr=4e-3"],
        "crops of 10 s from the start": ["--data.crop_schedule=[]"],
        "crops from anywhere": ["--data.crop_start=anywhere"],
        "stages equally often": ["--model.stage_weights=[1]"],
        "random embeddings": ["--model.start_from_codec=false"],
        "spans of 3": ["--model.span_len=3"],
    },
    "windows": {
        f"spans of {span}, {name}": [
            f"--model.span_len={span}",
            f"--model.network.context=[-1,{context}]",
        ]
        for span in (1, 3)
        for name, context in (
            ("windows of 25 above the first codebook", 25),
            ("windows of 5", 5),
            ("no windows", -1),
        )
    },
    "hybrid": {
        "hybrid, masks only": [*HYBRID, "--model.prompt_weight=0"],
        "hybrid, weight 0.17": [*HYBRID, "--model.prompt_weight=0.17"],
        "hybrid, weight 1": [*HYBRID, "--model.prompt_weight=1"],
        "no hybrid": ["--model.stage_sampling=example"],
    },
}
"""Options of each run, by table and name; the first is what the others are compared with."""


def runs(
    changes: dict[str, list[str]], out: Path, steps: int, seeds: list[int], precision: str
) -> list[Run]:
    """One run per change and seed, seeds first, so that a stopped benchmark is balanced."""
    third = steps // 3
    base = [
        "--config=conf/demo.yaml",
        "--generation.num_prompts=0",
        "--generation.at_start=false",
        "--trainer.limit_val_batches=12",
        f"--data.crop_schedule=[[2.5,{third}],[5.0,{third}]]",
        "--data.num_workers=0",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--trainer.precision={precision}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir=.",
    ]
    found = []
    for seed in seeds:
        for change, options in changes.items():
            folder = out / f"{change.replace(',', '').replace(' ', '_')},{seed}"
            own = [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
            values = {"change": change, "seed_everything": seed}
            found.append(Run(folder.name, folder, values, [*base, *options, *own]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("changes", choices=TABLES, help="What is compared.")
    parser.add_argument("--out", type=Path, help="Folder of the runs (default: runs/CHANGES).")
    parser.add_argument("--steps", type=int, default=120, help="Optimizer steps of each run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds.")
    parser.add_argument("--precision", default="bf16-mixed", help="Lightning's precision.")
    parser.add_argument("--jobs", type=int, default=1, help="Concurrent runs, one per core.")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    args = parser.parse_args()
    out = args.out or Path("runs") / args.changes
    out.mkdir(parents=True, exist_ok=True)
    every = runs(TABLES[args.changes], out, args.steps, args.seeds, args.precision)
    if not args.table:
        print(run_here(every, args.jobs) or "all runs finished")
    # The options that differ are what is compared, so the warning about them is dropped.
    ablation = replace(read_ablation(every), notes=[])
    title = f"{args.changes.capitalize()}, {args.steps} steps"
    (out / "table.md").write_text(ablation.markdown(title))
    plot(ablation, out / "plot.png")
    print(out / "table.md")


if __name__ == "__main__":
    main()
