"""Draws the bundled model's figures over the hours of its training.

    python data/demo/plot_training.py

Reads data/demo/magnet/training.json: one entry for each release, with its figures on the test
captions and the cross-entropy of each codebook by the number of validation clips. Entries of the
first phases have no cross-entropy, because the codebooks were in another order.
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAGNET = Path(__file__).parent / "magnet"
REAL = {"chroma_change": 0.396, "scale_fit": 0.361, "beat": 0.785}
COLOURS = ("C0", "C1", "C2", "C3", "C4")


def main() -> None:
    entries = json.loads((MAGNET / "training.json").read_text())
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, music, scores = figure.subplots(1, 3)

    for clips, style in (("96", "o-"), ("258", "s:")):
        measured = [entry for entry in entries if clips in entry.get("cross_entropy", {})]
        hours = [entry["core_hours"] for entry in measured]
        for codebook, colour in enumerate(COLOURS):
            values = [entry["cross_entropy"][clips][codebook] for entry in measured]
            label = f"codebook {codebook + 1}" if clips == "96" else None
            losses.plot(hours, values, style, color=colour, label=label)
    losses.set(title="cross-entropy in nats\n(squares: 258 clips, circles: 96)", ylim=(0, 3.6))

    hours = [entry["core_hours"] for entry in entries]
    for (name, real), colour in zip(REAL.items(), COLOURS, strict=False):
        values = [entry[name] for entry in entries]
        music.plot(hours, values, "o-", color=colour, label=name.replace("_", " "))
        music.axhline(real, color=colour, linestyle=":", linewidth=1)
    music.set(title="music figures; dotted: real clips", ylim=(0, 0.85))

    scored = [entry for entry in entries if "fad" in entry]
    hours = [entry["core_hours"] for entry in scored]
    scores.plot(hours, [entry["fad"] for entry in scored], "o-", color="C0", label="FAD (musicnn)")
    scores.set(title="FAD and text score", ylim=(0, 20))
    text = scores.twinx()
    text.plot(hours, [entry["text_gap"] for entry in scored], "s-", color="C1", label="text score")
    text.set(ylim=(0, 0.7))
    scores.legend(loc="lower left", frameon=False)
    text.legend(loc="lower right", frameon=False)

    losses.legend(frameon=False, fontsize=7, loc="center left")
    music.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (losses, music, scores):
        axis.set(xlabel="core-hours", xlim=(0, entries[-1]["core_hours"] + 0.5))
    figure.savefig(MAGNET / "training.png", dpi=80)


if __name__ == "__main__":
    main()
