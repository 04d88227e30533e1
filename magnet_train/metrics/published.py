"""Published results with sources, for comparison at the same protocol and dataset.

From audiocraft's model cards, for the released models (trained without vocals, decoded without
rescoring). The table of the MAGNeT paper is for other weights and not included.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published value."""

    model: str
    dataset: str
    """Complete evaluation set."""
    metric: str
    """fad/vggish (windows of the Google code), kl/passt (20 s; for sound kl/passt-10s) or text/clap
    (LAION music_audioset)."""
    value: float
    source: str

    @property
    def protocol(self) -> str:
        """Value of `published_protocol` in records with the same protocol and dataset."""
        return f"audiocraft/{self.dataset}"


RECIPES = {
    "MusicCaps": ("fad/vggish", "kl/passt", "text/clap"),
    "AudioCaps": ("fad/vggish", "kl/passt-10s", "text/clap"),
}
"""Published metrics by dataset."""


def _rows(
    dataset: str, source: str, figures: dict[str, tuple[float | None, ...]]
) -> list[Published]:
    return [
        Published(model, dataset, metric, value, f"audiocraft, model_cards/{source}")
        for model, values in figures.items()
        for metric, value in zip(RECIPES[dataset], values, strict=True)
        if value is not None
    ]


PUBLISHED = (
    *_rows(
        "MusicCaps",
        "MAGNET_MODEL_CARD.md",
        {
            "magnet-small-10secs": (4.22, 1.11, 0.28),
            "magnet-medium-10secs": (4.61, 1.14, 0.28),
            "magnet-small-30secs": (4.35, 1.17, 0.28),
            "magnet-medium-30secs": (4.63, 1.20, 0.28),
        },
    ),
    *_rows(
        "AudioCaps",
        "MAGNET_MODEL_CARD.md",
        {"audio-magnet-small": (3.21, 1.42, None), "audio-magnet-medium": (2.32, 1.64, None)},
    ),
    *_rows(
        "MusicCaps",
        "MUSICGEN_MODEL_CARD.md",
        {
            "musicgen-small": (4.88, 1.42, 0.27),
            "musicgen-medium": (5.14, 1.38, 0.28),
            "musicgen-large": (5.48, 1.37, 0.28),
            "musicgen-melody": (4.93, 1.41, 0.27),
        },
    ),
    *_rows("AudioCaps", "AUDIOGEN_MODEL_CARD.md", {"audiogen-medium": (1.77, 1.58, 0.30)}),
)
