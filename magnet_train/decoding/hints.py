"""Codes inside regenerated regions that are kept as hints, as in VampNet (Garcia et al., 2023).

Single frames (periodic, at onsets, random) or complete codebooks.

Imports torch only to compute, so that `edit --help` need not.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from magnet_train.common.ranges import check_values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hints:
    """Codes of the regions to keep as hints; also options of `edit`."""

    intensity: float = 1.0
    """Share of the regions' frames to regenerate, drawn at random, above 0 and at most 1."""
    hint_period_s: float | None = None
    """Keep one frame per this number of seconds in the regions, as a hint."""
    hint_onsets_s: float | None = None
    """Keep frames within this number of seconds of an onset in the regions, as hints."""
    hint_codebooks: int = 0
    """Number of codebooks to keep in hints, from the first on; 0 = all."""
    keep_coarse: int = 0
    """Number of first codebooks to keep in all frames of the regions; with the bundled codec, 1
    keeps the attacks, and 3 also keep the notes.
    """
    keep_fine: int = 0
    """Number of last codebooks to keep in all frames of the regions."""

    def __post_init__(self) -> None:
        seconds, codebooks = "(0, 3600] seconds", "[0, inf) codebooks"
        check_values(
            self,
            "--",
            intensity="(0, 1]",
            hint_period_s=seconds,
            hint_onsets_s=seconds,
            hint_codebooks=codebooks,
            keep_coarse=codebooks,
            keep_fine=codebooks,
        )

    @property
    def keep_any(self) -> bool:
        """Whether any code of the regions is kept."""
        return self != Hints(hint_codebooks=self.hint_codebooks)

    def given(
        self,
        to_decode: "Tensor",
        num_codebooks: int,
        frame_rate: float,
        onsets: "Tensor | None" = None,
        place: str = "0",
    ) -> "Tensor":
        """The codes to keep: `t` -> bool `k t`.

        Args:
            to_decode: frames of the regions, bool `t`.
            num_codebooks: k.
            frame_rate: frame rate in Hz.
            onsets: frames with an onset, bool `t`; needed for `hint_onsets_s`.
            place: key of the random numbers, such as "seed/item".
        """
        import torch

        from magnet_train.common.randomness import generator_for

        hints = torch.zeros_like(to_decode)
        frames = to_decode.nonzero()[:, 0]
        draws = generator_for(f"{place}/hints")
        if self.intensity < 1 and len(frames):
            num_to_decode = max(1, round(self.intensity * len(frames)))
            hints[frames[torch.randperm(len(frames), generator=draws)[num_to_decode:]]] = True
        if self.hint_period_s is not None:
            period = max(1, round(self.hint_period_s * frame_rate))
            offset = int(torch.randint(period, (), generator=draws))
            hints |= torch.arange(len(to_decode)).add(offset).remainder(period) == 0
        if self.hint_onsets_s is not None and onsets is not None:
            width = round(self.hint_onsets_s * frame_rate)
            near = torch.nn.functional.max_pool1d(
                onsets.float()[None], 2 * width + 1, stride=1, padding=width
            )
            hints |= near[0] > 0
        codebook = torch.arange(num_codebooks)
        of_hints = codebook < (self.hint_codebooks or num_codebooks)
        stays = (codebook < self.keep_coarse) | (codebook >= num_codebooks - self.keep_fine)
        return ~to_decode | hints & of_hints[:, None] | stays[:, None]
