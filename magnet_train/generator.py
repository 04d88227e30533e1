"""A trained model ready to play: network, codec, text encoder and decoding settings in one object.
 `load` takes a release folder, a hub id, a checkpoint or a run folder; `generate` takes captions
and gives audio. The command line, the validation callback and a notebook all go through it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.errors import UserError
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.decoding.decode import DecodingConfig, DecodingStep, Networks, decode, item_noise
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.decoding.rescoring import Rescorer
from magnet_train.model import Magnet, TextKeyValues
from magnet_train.release import SavedModel, check_codec, write_release
from magnet_train.rescorer import load_rescorer


@dataclass(frozen=True)
class Generated:
    """What came out for a batch of captions."""

    codes: Tensor
    """`b k t`."""
    wav: Tensor
    """`b channels samples`, as the codec gave it: not normalised."""
    sample_rate: int
    """Of `wav`, in Hz."""
    order: Tensor
    """`b k t`, the step in its stage at which a frame got its final code; -1 = it was given."""


@dataclass(frozen=True)
class DecodedItem:
    """What came out for one of many items."""

    key: str
    """Id of the item."""
    caption: str
    wav: Tensor
    """`channels samples`, as the codec gave it: not normalised."""
    sample_rate: int
    """Of `wav`, in Hz."""
    codes: Tensor
    """`k t`."""
    unmask_step: Tensor
    """`k t`, the step in its stage at which a code became final; -1 = it was given."""


class Generator:
    """Text to audio with one model; stateless, so that the same call gives the same audio."""

    def __init__(
        self,
        network: Magnet,
        codec: Codec,
        text_encoder: TextEncoder,
        decoding: DecodingConfig,
        crop_s: float,
        about: dict[str, Any] | None = None,
        guidance_dropout: float = 0.3,
        compiled: bool = False,
    ):
        """Puts the parts together.

        Args:
            network: in evaluation or training mode alike; it has no dropout.
            codec: whose codes the network was trained on.
            text_encoder: whose states it was trained on.
            decoding: used unless a call brings its own.
            crop_s: length of the crops it was trained on, in seconds; the default duration.
            about: provenance, written beside what is generated.
            guidance_dropout: share of examples that it was trained on without their caption, for a
                release.
            compiled: whether passes are compiled, on a GPU into graphs that are replayed; the first
                generation of a length and batch size then takes minutes.

        Raises:
            UserError: if codec or text encoder do not fit the network.
        """
        facts, config = codec.facts, network.config
        if (facts.num_codebooks, facts.codebook_size) != (
            config.num_codebooks,
            config.codebook_size,
        ):
            raise UserError(
                f"codec {facts.id!r} has {facts.num_codebooks} codebooks of {facts.codebook_size} "
                "entries, the network "
                f"{config.num_codebooks} of {config.codebook_size}: use the codec it was trained "
                "with"
            )
        if text_encoder.dim != config.text_dim:
            raise UserError(
                f"text encoder {text_encoder.id!r} is {text_encoder.dim} wide, the network "
                f"expects {config.text_dim}: "
                "use the encoder it was trained with"
            )
        self.network, self.codec, self.text_encoder = network, codec, text_encoder
        self.decoding, self.crop_s, self.about, self.guidance_dropout = (
            decoding,
            crop_s,
            about or {},
            guidance_dropout,
        )
        self._rescorers: dict[str, Rescorer] = {}
        # One graph for a whole pass: replayed, it leaves nothing to Python between the kernels.
        self._is_compiled, self._pass = compiled, network.forward
        if compiled:
            network.prepare_for_compile()
            self._pass = torch.compile(network.forward, mode="reduce-overhead", fullgraph=True)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.network.head.device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        items: Sequence[str] | None = None,
        duration_s: float | None = None,
        decoding: DecodingConfig | None = None,
        prompt_codes: Tensor | None = None,
        on_step: Callable[[DecodingStep], None] | None = None,
    ) -> Generated:
        """One piece of audio for each caption; "" generates without text.

        Args:
            prompts: captions; a single string is one caption.
            seed: of the noise; each item's depends on (seed, its id) alone, not on its neighbours.
            items: ids, as many as prompts. If None, each caption is its own id, and a caption that
                occurs again gets a number, so that equal captions give different audio.
            duration_s: length in seconds; the trained length if None.
            decoding: instead of the model's own.
            prompt_codes: `b k t`, beginning that is continued and stays as it is.
            on_step: told of every pass.

        Raises:
            UserError: if the length is not positive or shorter than the prompt, or the prompt does
                not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        items = numbered(prompts) if items is None else items
        config, facts = decoding or self.decoding, self.codec.facts
        duration_s = self.crop_s if duration_s is None else duration_s
        num_frames = round(duration_s * facts.frame_rate)
        if num_frames < 1:
            raise UserError(
                f"duration_s={duration_s} is shorter than one frame of {1 / facts.frame_rate} s"
            )
        codes = torch.zeros(
            len(prompts), facts.num_codebooks, num_frames, dtype=torch.long, device=self.device
        )
        fixed = torch.zeros(len(prompts), num_frames, dtype=torch.bool, device=self.device)
        if prompt_codes is not None:
            given = prompt_codes.shape[2]
            if given > num_frames or prompt_codes.shape[:2] != codes.shape[:2]:
                raise UserError(
                    f"prompt codes {tuple(prompt_codes.shape)} do not fit {tuple(codes.shape)}: "
                    "give one for each "
                    "caption, no longer than the duration"
                )
            codes[:, :, :given], fixed[:, :given] = prompt_codes.to(self.device), True
        order = torch.full(codes.shape, -1, dtype=torch.int16, device=self.device)

        def record(step: DecodingStep) -> None:
            order[:, step.stage, : step.masked.shape[1]].masked_fill_(step.masked, step.index)
            if on_step is not None:
                on_step(step)

        steps = config.steps_per_stage(facts.num_codebooks)
        noise = item_noise(seed, items, sum(steps), num_frames)
        text = None
        if any(p.strip() for p in prompts):
            # Keys and values of the text once per generation, not once per pass.
            states, tokens = (x.to(self.device) for x in self.text_encoder(list(prompts)))
            text = self.network.encode_text(states.to(self.network.head.dtype), tokens)
            if (
                config.reference_compat
            ):  # there, a caption's padding takes its share of the attention
                text = replace(text, allowed=text.allowed.any(1)[:, None].expand_as(text.allowed))
        networks = self._networks(text, config.cache_frames)
        if config.rescorer is not None:
            reading = self._rescorer(config.rescorer).reading(prompts)
            networks = networks._replace(rescorer=reading)
        codes = decode(networks, codes, fixed, facts.codebook_size, config, noise, record)
        order = order[
            ..., : codes.shape[2]
        ]  # reference_compat drops the frames behind the last whole span
        # One by one: the codec's rounding may depend on the batch, and a listener's file should
        # not.
        wav = torch.cat([self.codec.decode(row[None]) for row in codes])
        return Generated(codes, wav, facts.sample_rate, order)

    def _networks(self, text: TextKeyValues | None, cache_frames: bool) -> Networks:
        """The pass with text and that of the null condition, whose cross-attention is exactly zero
        and not computed.
        """
        if cache_frames:
            null = None if text is None else CachedForward(self.network, None)
            return Networks(CachedForward(self.network, text), null)

        def with_text(codes: Tensor, stage: int) -> Tensor:
            if self._is_compiled:  # what an earlier step's graph returned may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            return self._pass(codes, self.network.config.stage(stage), text)

        def without_text(codes: Tensor, stage: int) -> Tensor:
            return self._pass(codes, self.network.config.stage(stage), None)

        return Networks(with_text, None if text is None else without_text)

    def _rescorer(self, name: str) -> Rescorer:
        """Loaded when it is first asked for."""
        if name not in self._rescorers:
            self._rescorers[name] = load_rescorer(name, self.codec.facts, self.text_encoder)
        return self._rescorers[name]

    def decode_items(
        self,
        captions: Mapping[str, str],
        batch_size: int,
        seed: int = 0,
        decoding: DecodingConfig | None = None,
        duration_s: float | None = None,
        max_seconds: float | None = None,
    ) -> Iterator[DecodedItem]:
        """Generates audio for many items, batch by batch.

        The last batch is filled up with empty captions: another batch size could round differently
        and tip a tie, so codes would depend on how items are split over devices.

        Args:
            captions: by item id.
            batch_size: items decoded at once.
            seed: of the noise; each item's depends on (seed, its id) alone.
            decoding: instead of the model's own.
            duration_s: length in seconds; the trained length if None.
            max_seconds: no batch begins after this time; the remaining items are skipped.

        Yields:
            One result for each item, in order.
        """
        start = time.monotonic()
        keys = list(captions)
        for first in range(0, len(keys), batch_size):
            if max_seconds is not None and time.monotonic() - start > max_seconds:
                return
            batch = keys[first : first + batch_size]
            padding = batch_size - len(batch)
            prompts = [captions[key] for key in batch] + [""] * padding
            result = self.generate(
                prompts, seed, batch + ["padding"] * padding, duration_s, decoding
            )
            for i, key in enumerate(batch):
                yield DecodedItem(
                    key,
                    captions[key],
                    result.wav[i],
                    result.sample_rate,
                    result.codes[i],
                    result.order[i],
                )

    def save(self, out: str | Path, card: str | None = None) -> None:
        """Write a release: `config.json`, `model.safetensors`, `README.md`, and the codec if it
        lies in a folder.

        Args:
            out: folder; must not exist, or be empty.
            card: README.md; one with provenance, licence and use if None.

        Raises:
            UserError: if `out` holds anything already.
        """
        trained = SavedModel(
            Path(out),
            self.network.config,
            self.codec.facts.to_dict(),
            self.text_encoder.id,
            self.crop_s,
            self.decoding,
            self.guidance_dropout,
            self.about,
        )
        weights = self.network.state_dict()
        write_release(
            Path(out), trained, {k: lambda v=v: v.cpu() for k, v in weights.items()}, card
        )


def numbered(names: Sequence[str]) -> list[str]:
    """Names made unique by a number behind each repetition.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def load(
    path: str | Path = "demo",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Generator:
    """A model from a release folder, a hub id, a Lightning checkpoint, or a run folder (its newest
    checkpoint).

    Args:
        path: "demo" for the shipped model.
        device: where it shall run.
        dtype: of the network's weights; in bfloat16 other codes come out than in float32.
        compiled: see `Generator`.

    Raises:
        UserError: if nothing usable is there; the message names the file.
    """
    trained = SavedModel.open(path)
    network, codec = trained.build(), load_codec(trained.codec["id"])
    check_codec(trained.codec, codec.facts, trained.file.parent)
    text_encoder = load_text_encoder(trained.text_encoder)
    network.to(device, dtype).eval()
    codec.to(device)
    text_encoder.to(device)
    return Generator(
        network,
        codec,
        text_encoder,
        trained.decoding,
        trained.crop_s,
        trained.provenance,
        trained.guidance_dropout,
        compiled,
    )
