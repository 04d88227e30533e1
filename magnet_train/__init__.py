"""Training of MAGNeT: masked, non-autoregressive text-to-audio (Ziv et al., ICLR 2024).

>>> import magnet_train
>>> model = magnet_train.load("demo")  # doctest: +SKIP
>>> audio = model.generate(["a slow waltz for piano"], seed=0, duration_s=1.0)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from magnet_train.generator import Generator

__version__ = "0.1.0"


def load(path: str = "demo", device: str = "cpu", lora: "Sequence[str]" = ()) -> "Generator":
    """Load a model from a release folder, hub id, checkpoint or run folder; "demo" is bundled.

    `lora` has folders of LoRA adapters, each optionally with `:STRENGTH`.

    Its `generate(prompts, seed=…, duration_s=…)` returns codes, audio and the order of unmasking.

    Raises:
        magnet_train.common.errors.UserError: if no usable model is found; the message names the
            file.
    """
    from magnet_train.generator import load  # deferred: importing torch would slow `--help`

    return load(path, device, lora=lora)
