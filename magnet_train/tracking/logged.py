"""All logged names: meaning, direction of improvement and section of the dashboard.

W&B's axes, the workspace of `dashboard` and docs/metrics.md are generated from this list, and a
test compares it with what `fit` logs. To log something new, add an entry.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from magnet_train.common.tables import markdown_table
from magnet_train.metrics.music import MEASURES
from magnet_train.metrics.scoring import METRICS

STEP = "trainer/global_step"
"""Axis of every logger: optimizer steps."""
HOURS = "train/audio_hours"
"""Second axis in W&B: hours of audio seen."""
PLACEHOLDERS = {
    "k": r"\d+",
    "rate": r"[\d.]+",
    "metric": f"(?:{'|'.join(METRICS)})",
    "embedder": "[a-z0-9-]+",
    "measure": f"(?:{'|'.join(MEASURES)})",
    "baseline": "(?:codec|unigram|bigram)",
}
"""Regular expression of each placeholder in a name."""
SECTIONS = (
    "validation",
    "generated audio",
    "codebooks",
    "training",
    "guards",
    "speed",
    "more of validation",
)
"""Sections of the dashboard, from top to bottom."""


Direction = Literal["lower", "higher", ""]
ARROWS: dict[Direction, str] = {"lower": "↓", "higher": "↑", "": ""}
TITLES = {
    "ce": "cross-entropy",
    "fad": "FAD",
    "fad_inf": "FAD for infinitely many samples",
    "kad": "KAD",
    "kid": "KID",
    "kl": "KL",
    "text": "text score",
    "num_clips": "clips",
}
"""Names of metrics for readers, where they are not the words of the logged name."""


@dataclass(frozen=True)
class Logged:
    """A logged name, or a pattern of names."""

    name: str
    """Name; `{k}` is a codebook from 0, `{rate}` a share of masked frames, `{metric}` and
    `{embedder}` as in `evaluate`."""
    meaning: str
    """A phrase, with its unit or range."""
    section: str
    better: Direction = ""
    """Direction of improvement; empty if there is none."""
    shown: bool = True
    """Whether the dashboard has a panel for it."""
    is_media: bool = False

    @cached_property
    def pattern(self) -> str:
        """A regular expression for the complete key."""
        parts = re.split(r"\{(\w+)\}", self.name)
        return "".join(PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))


DEFAULT_METRICS = ("fad", "kl", "text")
"""Metrics that `fit` computes by default."""
_LOWER = ("fad", "fad_inf", "kad", "kid", "kl", "key_rank", "note_lengths", "note_intervals")
_HIGHER = (
    *("precision", "recall", "density", "coverage", "vendi"),
    *("text", "text_r1", "text_r10", "scale_fit", "beat"),
)
"""Metrics and measures by the direction of improvement. Others have none: chroma_change should
equal that of real clips, and random codes can exceed it."""
Entry = tuple[str, Direction, str]
"""Name, direction of improvement and meaning."""


def _entries(section: str, *entries: Entry, **flags: bool) -> list[Logged]:
    return [Logged(name, meaning, section, better, **flags) for name, better, meaning in entries]


def _better(name: str) -> Direction:
    if name in _LOWER:
        return "lower"
    return "higher" if name in _HIGHER else ""


def _metric(name: str) -> Entry:
    return f"val/{name}/{{embedder}}", _better(name), METRICS[name]


def _measure(name: str) -> Entry:
    return f"val/music/{name}", _better(name), MEASURES[name]


LOGGED: tuple[Logged, ...] = (
    *_entries(
        "validation",
        (
            "val/ce",
            "lower",
            "cross-entropy on fixed masks, mean over all codebooks' masked frames, in nats",
        ),
        *map(_metric, DEFAULT_METRICS),
    ),
    *_entries(
        "more of validation",
        *(_metric(name) for name in METRICS if name not in DEFAULT_METRICS),
        (
            "val/ce/reading",
            "lower",
            "hybrids only: autoregressive cross-entropy of all codes, in nats",
        ),
        (
            "train/ce/prompt",
            "lower",
            "hybrids only: autoregressive cross-entropy of the prompts in training, in nats",
        ),
        *map(_measure, MEASURES),
    ),
    *_entries(
        "more of validation",
        ("val/music/{measure}_ci95", "", "half of that measure's 95 % interval over clips"),
        ("val/music/{measure}/baseline_{baseline}", "", "that measure for a baseline"),
        shown=False,
    ),
    *_entries(
        "validation",
        ("val/{metric}/{embedder}_ci95", "", "half of that metric's 95 % interval over clips"),
        (
            "val/{metric}/{embedder}/baseline_codec",
            "",
            "that metric for the codec's reconstructions of the real clips",
        ),
        (
            "val/{metric}/{embedder}/baseline_unigram",
            "",
            "that metric for codes drawn by their frequencies",
        ),
        (
            "val/{metric}/{embedder}/baseline_bigram",
            "",
            "that metric for codes drawn by the bigram counts of training",
        ),
        ("val/num_clips", "", "generated clips that were scored"),
        shown=False,
    ),
    *_entries(
        "generated audio",
        (
            "gen/clips",
            "",
            "a table with rows of every validation: step, item, caption, audio, plot, score",
        ),
        ("gen/audio", "", "the clips of each validation"),
        (
            "gen/real",
            "",
            "the real clips of the same items through the codec, once per session; W&B only",
        ),
        ("gen/plots", "", "spectrograms of these clips, with the order of unmasking"),
        is_media=True,
    ),
    *_entries(
        "codebooks",
        ("val/ce/stage{k}", "lower", "cross-entropy of codebook k on fixed masks, in nats"),
        (
            "val/ce/stage{k}/rate{rate}",
            "lower",
            "val/ce/stage{k} at one share of masked frames, in nats",
        ),
        ("val/accuracy/stage{k}", "higher", "accuracy of codebook k on fixed masks, 0 to 1"),
        (
            "val/accuracy/stage{k}/baseline_copying",
            "",
            "accuracy of copying the nearest visible code, 0 to 1",
        ),
        (
            "val/ce/stage{k}/baseline_unigram",
            "",
            "cross-entropy of the unigram baseline (code frequencies in training), in nats",
        ),
        (
            "val/ce/stage{k}/baseline_bigram",
            "",
            "cross-entropy of the bigram baseline (given the previous code), in nats",
        ),
        (
            "train/ce/stage{k}",
            "lower",
            "cross-entropy of codebook k in training batches, in nats",
        ),
        (
            "train/accuracy/stage{k}",
            "higher",
            "accuracy of codebook k in training batches, 0 to 1",
        ),
    ),
    *_entries(
        "codebooks",
        (
            "val/accuracy/stage{k}/rate{rate}",
            "higher",
            "val/accuracy/stage{k} at one share of masked frames",
        ),
        (
            "val/accuracy/stage{k}/baseline_copying/rate{rate}",
            "",
            "accuracy of copying at one share of masked frames",
        ),
        ("val/ce/baseline_unigram", "", "mean of the codebooks' unigram cross-entropies, in nats"),
        ("val/ce/baseline_bigram", "", "mean of the codebooks' bigram cross-entropies, in nats"),
        ("val/ce/stage{k}_ci95", "", "half of val/ce/stage{k}'s 95 % interval over items"),
        shown=False,
    ),
    *_entries(
        "training",
        (
            "train/loss",
            "lower",
            "training loss: mean cross-entropy of a batch's masked frames, in nats",
        ),
        ("train/lr", "", "learning rate"),
        ("train/grad_norm", "", "norm of all gradients, before clipping"),
        ("train/audio_hours", "", "hours of audio seen, all ranks, since the run began"),
    ),
    *_entries(
        "training",
        ("epoch", "", "epochs as Lightning counts them; training data is endless"),
        shown=False,
    ),
    *_entries(
        "guards",
        (
            "train/steps_skipped",
            "lower",
            (
                "steps skipped so far because of a non-finite loss or gradient; in 16-mixed also "
                "those that find the scale"
            ),
        ),
        (
            "data/shards_skipped",
            "lower",
            "failed reads of shards by data workers, since the process started",
        ),
        ("data/items_skipped", "lower", "items in the skipped shards"),
    ),
    *_entries(
        "speed",
        (
            "speed/examples_per_s",
            "higher",
            "examples per second (rank 0 times the number of ranks), without validation",
        ),
        (
            "speed/frames_per_s",
            "higher",
            "frames per second without padding (rank 0 times the number of ranks)",
        ),
        ("speed/audio_hours_per_s", "higher", "hours of audio seen per second, all ranks"),
        (
            "speed/data_share",
            "lower",
            "share of time spent waiting for data, 0 to 1; maximum over ranks",
        ),
        (
            "speed/peak_memory_gb",
            "lower",
            "peak memory of a GPU, or of a process on a CPU, in GB; maximum over ranks",
        ),
        (
            "speed/mfu",
            "higher",
            "model FLOP utilisation: FLOP needed by the model over the device's peak, 0 to 1",
        ),
    ),
)


def find(key: str) -> Logged | None:
    """The definition of a logged name, or None.

    >>> find("val/fad/vggish").better, find("train/ce/stage3").section, find("nonsense")
    ('lower', 'codebooks', None)
    """
    return next((entry for entry in LOGGED if re.fullmatch(entry.pattern, key)), None)


def arrow(key: str) -> str:
    """An arrow in the direction that is better; empty if neither is.

    >>> arrow("val/fad/vggish"), arrow("val/text/clap"), arrow("val/music/periodicity")
    ('↓', '↑', '')
    """
    found = find(key)
    return ARROWS[found.better] if found else ""


def title(key: str) -> str:
    """The name of a validation metric for readers: codebooks count from 1, with an arrow.

    >>> title("val/fad/vggish"), title("val/ce/stage0"), title("val/music/key_rank")
    ('FAD (vggish) ↓', 'cross-entropy, codebook 1 ↓', 'key rank ↓')
    >>> title("val/music/chroma_change"), title("train/loss")
    ('chroma change', 'train/loss')
    """
    if not key.startswith("val/"):
        return key
    first, *rest = key.removeprefix("val/").removeprefix("music/").split("/")
    name = TITLES.get(first, first.replace("_", " "))
    for part in rest:
        stage = re.fullmatch(r"stage(\d+)", part)
        name += f", codebook {int(stage[1]) + 1}" if stage else f" ({part})"
    return f"{name} {arrow(key)}".rstrip()


def table() -> str:
    """Markdown table with a row per name, as in docs/metrics.md."""
    rows = [[f"`{entry.name}`", ARROWS[entry.better], entry.meaning] for entry in LOGGED]
    return markdown_table(["name", "better", "meaning"], rows, num_left=3)
