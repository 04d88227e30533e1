"""What a run logs: every name with its meaning, its better direction and its place on a dashboard, defined once.

W&B's axes, the workspace of `dashboard` and METRICS.md are made of this list; a test holds what `fit` logs to it. A new
figure is a line here.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from magnet_train.metrics.scoring import KINDS

STEP, HOURS = "trainer/global_step", "train/audio_hours"
"""The axes: optimizer steps, under which every logger files its rows, and hours of audio heard, in every row of W&B."""
PLACEHOLDERS = {"k": r"\d+", "rate": r"[\d.]+", "kind": f"(?:{'|'.join(KINDS)})", "listener": "[a-z0-9-]+"}
"""What may stand for each `{…}` in a name."""
SECTIONS = ("validation", "generated audio", "codebooks", "training", "guards", "speed", "more of validation")
"""Of the dashboard, from the top down."""


Direction = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Logged:
    """One name, or one pattern of names."""

    name: str
    """Key; `{k}` is a codebook from 0, `{rate}` a share of masked frames, `{kind}` and `{listener}` as in a metric."""
    meaning: str
    """A phrase, with the unit or the range."""
    section: str
    better: Direction = ""
    """Direction of improvement; empty where there is none."""
    shown: bool = True
    """Whether the dashboard has a panel for it."""
    is_media: bool = False

    @cached_property
    def pattern(self) -> str:
        """A regular expression for the whole key."""
        parts = re.split(r"\{(\w+)\}", self.name)
        return "".join(PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))


SHOWN_FIRST = ("fad", "kl", "text")
"""Kinds of metrics that `fit` computes unless others are asked for."""
_BETTER: dict[str, Direction] = {
    "fad": "lower", "fad_inf": "lower", "kad": "lower", "kid": "lower", "precision": "higher", "recall": "higher",
    "density": "higher", "coverage": "higher", "vendi": "higher", "kl": "lower", "text": "higher", "text_shuffled": "",
    "text_r1": "higher", "text_r10": "higher",
}  # fmt: skip


def _of(section: str, *entries: tuple[str, Direction, str], **more: bool) -> list[Logged]:
    return [Logged(name, meaning, section, better, **more) for name, better, meaning in entries]


def _kind(kind: str) -> tuple[str, Direction, str]:
    return f"val/{kind}/{{listener}}", _BETTER[kind], KINDS[kind]


LOGGED: tuple[Logged, ...] = (
    *_of(
        "validation",
        ("val/ce", "lower", "cross-entropy on fixed masks, mean over all codebooks' masked frames, in nats"),
        *map(_kind, SHOWN_FIRST),
    ),
    *_of("more of validation", *(_kind(kind) for kind in KINDS if kind not in SHOWN_FIRST)),
    *_of(
        "validation",
        ("val/{kind}/{listener}_ci95", "", "half of that figure's 95 % interval over clips"),
        ("val/{kind}/{listener}/floor_codec", "", "that figure for the codec's reconstructions of the real clips"),
        ("val/{kind}/{listener}/floor_unigram", "", "that figure for codes drawn by their frequencies"),
        ("val/num_clips", "", "generated clips that the figures are of"),
        shown=False,
    ),
    *_of(
        "generated audio",
        ("gen/clips", "", "a table that every validation adds to: step, item, caption, audio, picture, score"),
        ("gen/audio", "", "the clips of each validation"),
        ("gen/pictures", "", "their spectrograms, with the order of unmasking"),
        is_media=True,
    ),
    *_of(
        "codebooks",
        ("val/ce/stage{k}", "lower", "cross-entropy of codebook k on fixed masks, in nats"),
        ("val/ce/stage{k}/rate{rate}", "lower", "the same at one share of masked frames"),
        ("val/accuracy/stage{k}", "higher", "share of its masked frames whose code is the likeliest, 0 to 1"),
        ("train/ce/stage{k}", "lower", "cross-entropy of codebook k in the batches that trained it, in nats"),
        ("train/accuracy/stage{k}", "higher", "share of their masked frames whose code is the likeliest, 0 to 1"),
    ),
    *_of("codebooks", ("val/ce/stage{k}_ci95", "", "half of val/ce/stage{k}'s 95 % interval over items"), shown=False),
    *_of(
        "training",
        ("train/loss", "lower", "what is minimised: mean cross-entropy of a batch's masked frames, in nats"),
        ("train/lr", "", "learning rate"),
        ("train/grad_norm", "", "norm of all gradients before clipping"),
        ("train/audio_hours", "", "hours of audio heard by all ranks since the run began"),
    ),
    *_of("training", ("epoch", "", "Lightning's count; training data has no end of its own"), shown=False),
    *_of(
        "guards",
        (
            "train/steps_skipped",
            "lower",
            "steps skipped so far, whose loss or gradients were not finite; some find the scale of 16-mixed",
        ),
        ("data/shards_skipped", "lower", "shards that no loader process could read, each time it was its turn"),
        ("data/items_skipped", "lower", "items in them"),
    ),
    *_of(
        "speed",
        ("speed/examples_per_s", "higher", "examples a second, the first rank's times the ranks, validation left out"),
        ("speed/frames_per_s", "higher", "frames a second, the first rank's times the ranks, without padding"),
        ("speed/audio_hours_per_s", "higher", "hours of audio heard by all ranks in a second"),
        (
            "speed/data_share",
            "lower",
            "share of the time spent waiting for a batch, 0 to 1; of the rank that waits most",
        ),
        ("speed/peak_memory_gb", "lower", "most memory so far of a GPU, or on a CPU of a process, in GB, of all ranks"),
        ("speed/mfu", "higher", "operations that the model needs over those that the device could do, 0 to 1"),
    ),
)


def find(key: str) -> Logged | None:
    """The definition of a logged key; None if it has none.

    >>> find("val/fad/vggish").better, find("train/ce/stage3").section, find("nonsense")
    ('lower', 'codebooks', None)
    """
    return next((entry for entry in LOGGED if re.fullmatch(entry.pattern, key)), None)


def table() -> str:
    """Markdown with a row for each name, as METRICS.md has it."""
    signs = {"lower": "↓", "higher": "↑", "": ""}
    rows = [f"| `{entry.name}` | {signs[entry.better]} | {entry.meaning} |" for entry in LOGGED]
    return "\n".join(["| name | better | meaning |", "|---|---|---|", *rows])
