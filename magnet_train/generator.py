"""A loaded model: network, codec, text encoder and decoding settings.

`load` opens a release folder, hub id, checkpoint or run folder. `generate` turns captions into
audio, and `edit` regenerates parts of a recording. Both use `fill`, which decodes all codes that
are not given. Used by the command line, the validation callback and notebooks.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import as_tuple
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.decoding.autoregressive import (
    autoregressive_frames,
    autoregressive_noise,
    decode_beginning,
)
from magnet_train.decoding.decode import (
    DecodingConfig,
    DecodingStep,
    Network,
    Networks,
    circular,
    decode,
    item_noise,
    with_beginning,
)
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.decoding.joins import (
    BLOCK_S,
    Join,
    decode_blocks,
    decode_loop,
    encode_blocks,
    join_loop,
    linear_render,
    resample,
    resample_loop,
)
from magnet_train.decoding.keep import (
    OVERLAP,
    SEAM_S,
    Edit,
    Plan,
    check_loop,
    onset_frames,
    windows,
)
from magnet_train.decoding.load_rescorer import load_rescorer
from magnet_train.decoding.rescoring import Rescorer
from magnet_train.layout import prompt_frames
from magnet_train.model import Magnet, TextKeyValues
from magnet_train.release import SavedModel, check_codec, write_release


@dataclass(frozen=True)
class Generated:
    """Results of a batch of captions."""

    codes: Tensor
    """`b k t`."""
    wav: Tensor
    """`b channels samples`, the codec's output, not normalised."""
    sample_rate: int
    """Sample rate of `wav`, in Hz."""
    order: Tensor
    """`b k t`, step of its stage at which a code became final; -1 = given."""

    def save(self, path: str | Path) -> list[Path]:
        """Write the clips to `path` (.wav, .flac or .ogg), levelled for listening; several clips
        get numbers, as in `waltz-0.wav`. Returns the files.

        Raises:
            UserError: if the format is unknown or the file cannot be written.
        """
        import soundfile

        from magnet_train.common.audio_files import write_sound

        path, wavs = Path(path).expanduser(), self._for_listening()
        many = len(wavs) > 1
        paths = [path.with_stem(f"{path.stem}-{i}") if many else path for i in range(len(wavs))]
        try:
            for file, wav in zip(paths, wavs, strict=True):
                write_sound(file, wav, self.sample_rate)
        except (OSError, TypeError, soundfile.LibsndfileError) as error:
            raise UserError(f"{path}: cannot be written ({error}); give a .wav file") from error
        return paths

    def play(self) -> None:
        """Show a player for each clip in a notebook.

        Raises:
            UserError: without IPython.
        """
        try:
            notebook = import_module("IPython.display")
        except ImportError as error:
            raise UserError(
                "play() is for notebooks: use save(FILE), or install IPython"
            ) from error
        for wav in self._for_listening():
            notebook.display(notebook.Audio(wav.T, rate=self.sample_rate, normalize=False))

    def _for_listening(self) -> list[Any]:
        """Arrays `samples channels`."""
        from magnet_train.common.audio_files import normalize_for_listening

        return [normalize_for_listening(w.T.cpu().numpy(), self.sample_rate) for w in self.wav]


@dataclass(frozen=True)
class DecodedItem:
    """Result of one of many items."""

    key: str
    """Id of the item."""
    caption: str
    wav: Tensor
    """`channels samples`, the codec's output, not normalised."""
    sample_rate: int
    """Sample rate of `wav`, in Hz."""
    codes: Tensor
    """`k t`."""
    unmask_step: Tensor
    """`k t`, the step in its stage at which a code became final; -1 = it was given."""


Cue = tuple[float, str]
"""Start in seconds and prompt from there on."""


@dataclass(frozen=True)
class Edited:
    """A recording with regenerated parts."""

    codes: Tensor
    """`k t`."""
    given: Tensor
    """bool `k t`, codes of the recording that were kept."""
    unmask_step: Tensor
    """`k t`, the step in its stage at which a code became final; -1 = it was given."""
    seed: int
    """Seed of the noise."""
    sample_rate: int
    """Sample rate of the recording, in Hz."""
    join: Join
    """The recording, and the regenerated frames."""
    codec: Codec

    def seconds(self, frame: int) -> float:
        """Start of a frame in the result, in seconds."""
        return min(frame * self.join.samples_per_frame, self.join.num_samples) / self.sample_rate

    def blocks(self) -> Iterator[Tensor]:
        """The audio in blocks of `channels samples`; outside the regions, the recording."""
        if not self.join.is_loop:
            yield from self.join.blocks(linear_render(self.codec, self.codes, self.sample_rate))
            return
        hop = self.codec.facts.hop_samples
        recorded = resample_loop(self.join.original, self.codes.shape[1] * hop).clone()
        recorded[:, self.join.to_decode.repeat_interleave(hop)] = math.nan
        loop = decode_loop(self.codec, self.codes, SEAM_S, recorded)
        yield join_loop(self.join, resample_loop(loop, self.join.num_samples))

    @cached_property
    def wav(self) -> Tensor:
        """The complete audio, `channels samples`, not normalised."""
        return torch.cat(list(self.blocks()), 1)


class Generator:
    """Text-to-audio generation and editing with one model; equal calls give equal audio."""

    def __init__(
        self,
        network: Magnet,
        codec: Codec,
        text_encoder: TextEncoder,
        decoding: DecodingConfig,
        crop_s: float,
        provenance: dict[str, Any] | None = None,
        guidance_dropout: float = 0.3,
        compiled: bool = False,
    ):
        """
        Args:
            network: the network, in any mode, because it has no dropout.
            codec: codec that the network was trained with.
            text_encoder: text encoder that the network was trained with.
            decoding: default decoding settings.
            crop_s: length of the training crops in seconds; the default duration.
            provenance: origin of the weights, written next to generated files.
            guidance_dropout: share of examples trained without their caption, for a release.
            compiled: compile the passes, on a GPU into CUDA graphs; the first generation of each
                length and batch size then takes minutes.

        Raises:
            UserError: if codec or text encoder do not match the network.
        """
        facts, config = codec.facts, network.config
        if (facts.num_codebooks, facts.codebook_size) != (
            config.num_codebooks,
            config.codebook_size,
        ):
            raise UserError(
                f"codec {facts.id!r} has {facts.num_codebooks} codebooks of {facts.codebook_size} "
                f"entries, the network {config.num_codebooks} of {config.codebook_size}: use the "
                "codec it was trained with"
            )
        if text_encoder.dim != config.text_dim:
            raise UserError(
                f"text encoder {text_encoder.id!r} is {text_encoder.dim} wide, the network "
                f"expects {config.text_dim}: use the encoder it was trained with"
            )
        self.network, self.codec, self.text_encoder = network, codec, text_encoder
        self.decoding = decoding
        self.crop_s = crop_s
        self.provenance = provenance or {}
        self.guidance_dropout = guidance_dropout
        self._rescorers: dict[str, Rescorer] = {}
        # One CUDA graph per pass, without Python overhead between kernels.
        self._is_compiled, self._pass = compiled, network.forward
        if compiled:
            network.prepare_for_compile()
            self._pass = torch.compile(network.forward, mode="reduce-overhead", fullgraph=True)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.head.device

    def num_frames(self, duration_s: float | None = None) -> int:
        """Frames of a duration in seconds (default: the trained length)."""
        seconds = self.crop_s if duration_s is None else duration_s
        return round(seconds * self.codec.facts.frame_rate)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        items: Sequence[str] | None = None,
        duration_s: float | None = None,
        decoding: DecodingConfig | None = None,
        prompt_codes: Tensor | None = None,
        on_step: Callable[[DecodingStep], object] | None = None,
        loop: bool = False,
    ) -> Generated:
        """Generate audio for each caption; "" generates without text.

        Args:
            prompts: captions; a single string is one caption.
            seed: seed of the noise, which is a function of (seed, id) for each item.
            items: one id per prompt. By default each caption is its own id, and repeated captions
                are numbered, so that they give different audio.
            duration_s: length in seconds (default: the trained length); longer audio is decoded in
                overlapping windows.
            decoding: decoding settings (default: the model's).
            prompt_codes: `b k t`, beginning to continue, which is not changed.
            on_step: called after every step.
            loop: make the end continue with the beginning.

        Raises:
            UserError: if the length is not positive or shorter than the prompt, the prompt has the
                wrong shape, or a loop is longer than the trained length.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        items = numbered(prompts) if items is None else items
        facts = self.codec.facts
        duration_s = self.crop_s if duration_s is None else duration_s
        num_frames = self.num_frames(duration_s)
        if num_frames < 1:
            raise UserError(
                f"duration_s={duration_s} is shorter than one frame of {1 / facts.frame_rate} s"
            )
        if loop:
            check_loop(duration_s, facts.sample_rate, facts.frame_rate, self.crop_s)
        codes = torch.zeros(
            len(prompts), facts.num_codebooks, num_frames, dtype=torch.long, device=self.device
        )
        given = torch.zeros_like(codes, dtype=torch.bool)
        if prompt_codes is not None:
            length = prompt_codes.shape[2]
            if length > num_frames:
                raise UserError(
                    f"duration_s={duration_s:g} is shorter than the beginning to continue, "
                    f"{length / facts.frame_rate:g} s: raise it, or keep less (continue_s)"
                )
            if prompt_codes.shape[:2] != codes.shape[:2]:
                raise UserError(
                    f"prompt_codes: {len(prompt_codes)} rows of {prompt_codes.shape[1]} codebooks "
                    f"for {len(codes)} prompts and {codes.shape[1]} codebooks; give a row for each"
                )
            codes[..., :length], given[..., :length] = prompt_codes.to(self.device), True
        codes, order = self.fill(codes, given, [(0, prompts)], seed, items, decoding, loop, on_step)
        # One by one, because the codec's rounding may depend on the batch.
        if loop:
            num_samples = round(duration_s * facts.sample_rate)
            loops = [decode_loop(self.codec, row, SEAM_S) for row in codes]
            wav = torch.stack([resample_loop(one, num_samples) for one in loops])
        else:
            wav = torch.stack([decode_blocks(self.codec, row, SEAM_S) for row in codes])
        return Generated(codes, wav, facts.sample_rate, order)

    @torch.no_grad()
    def fill(
        self,
        codes: Tensor,
        given: Tensor,
        cues: Sequence[tuple[int, Sequence[str]]],
        seed: int,
        items: Sequence[str],
        decoding: DecodingConfig | None = None,
        loop: bool = False,
        on_step: Callable[[DecodingStep], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode all codes that are not given, at any length.

        Sequences above the trained length are decoded in windows of that length, with 40 % of each
        window already known, so that memory is constant.

        Args:
            codes: `b k t`; ignored where not `given`.
            given: bool `b k t`, True = kept unchanged.
            cues: start frames with one prompt per row; the first starts at frame 0.
            seed: seed of the noise.
            items: ids of the rows; their noise is a function of (seed, id).
            decoding: decoding settings (default: the model's).
            loop: make the last frame continue with the first; decoded as one window.
            on_step: called after every step, with the codes of its window.

        Returns:
            Codes `b k t`, and `b k t` the step of its stage at which each became final (-1: given).
        """
        config, t, size = decoding or self.decoding, codes.shape[2], self.num_frames()
        if loop and (t > size or config.reference_compat):
            raise UserError(
                f"a loop of {t} frames: must have at most {size}, the length that the model was "
                "trained on, and reference_compat false"
            )
        rate = self.codec.facts.frame_rate
        beginning = autoregressive_frames(self.network.config, config, t, rate)
        if config.reference_compat:  # in one window; drops the frames after the last full span
            networks = self._networks(cues[0][1], config)
            return self._decode(networks, codes, given, config, seed, items, on_step)
        codes, given = codes.clone(), given.clone()
        order = torch.full(codes.shape, -1, dtype=torch.int16, device=codes.device)
        to_decode = (~given).any(0).any(0).cpu()
        cuts = [frame for frame, _ in cues[1:]]
        for number, window in enumerate(windows(to_decode, size, int(OVERLAP * size), cuts)):
            part = slice(window.start, window.end)
            prompts = next(texts for frame, texts in reversed(cues) if frame <= window.first)
            networks = self._networks(prompts, config)
            if loop:
                networks = circular(networks, t, max((size - t) // 2, size // 10))
            names = items if number == 0 else [f"{item}@{window.first}" for item in items]
            new = ~given[..., part]
            new[..., window.stop - window.start :] = False
            made, known = codes[..., part].clone(), given[..., part].clone()
            steps = torch.zeros_like(order[..., part])
            begun = slice(0, max(0, min(beginning, window.end) - window.start))
            if begun.stop:  # a hybrid's first frames, one after the other
                made[..., begun] = self._begin(
                    prompts, made[..., begun], known[..., begun], config, seed, names
                )
                known[..., begun] = True
            if self.network.config.order == "hybrid":
                leading = known.all(1).all(0).long().cumprod(0).sum()
                is_shown = prompt_frames(leading[None], *known.shape[1:])
                networks = with_beginning(networks, made, is_shown)
            if not known.all():
                made, steps = self._decode(networks, made, known, config, seed, names, on_step)
                steps[..., begun] = 0
            codes[..., part] = torch.where(new, made, codes[..., part])
            order[..., part] = torch.where(new, steps, order[..., part])
            given[..., part] |= new
        return codes, order

    def count_steps(self, to_decode: Tensor, decoding: DecodingConfig | None = None) -> int:
        """Number of steps to decode the frames `to_decode` (bool `t`), for a progress bar."""
        config, size = decoding or self.decoding, self.num_frames()
        if config.reference_compat:  # in one window
            size = max(size, len(to_decode))
        num_windows = len(list(windows(to_decode, size, int(OVERLAP * size))))
        return num_windows * config.num_steps(self.codec.facts.num_codebooks)

    def _begin(
        self,
        prompts: Sequence[str],
        codes: Tensor,
        given: Tensor,
        config: DecodingConfig,
        seed: int,
        items: Sequence[str],
    ) -> Tensor:
        """Frames decoded one after the other: `b k t`."""
        negative = [config.negative_prompt] * len(prompts)
        texts = self._text(prompts, config), self._text(negative, config)
        noise = autoregressive_noise(seed, items, codes.shape[1], sum(codes.shape[1:]))
        return decode_beginning(self.network, texts, codes, given, config, noise.to(self.device))

    def _decode(
        self,
        networks: Networks,
        codes: Tensor,
        given: Tensor,
        config: DecodingConfig,
        seed: int,
        items: Sequence[str],
        on_step: Callable[[DecodingStep], object] | None,
    ) -> tuple[Tensor, Tensor]:
        """Decode one window `b k t`; returns codes and the steps at which they became final."""
        order = torch.full(codes.shape, -1, dtype=torch.int16, device=codes.device)

        def record(step: DecodingStep) -> None:
            order[:, step.stage, : step.masked.shape[1]].masked_fill_(step.masked, step.index)
            if on_step is not None:
                on_step(step)

        noise = item_noise(seed, items, config.num_steps(codes.shape[1]), codes.shape[2])
        size = self.codec.facts.codebook_size
        codes = decode(networks, codes, given.cpu(), size, config, noise, record)
        return codes, order[..., : codes.shape[2]]

    @torch.no_grad()
    def edit(
        self,
        wav: Tensor,
        sample_rate: int,
        edit: Edit,
        prompts: str | Sequence[Cue] = "",
        seed: int = 0,
        variations: int = 1,
        decoding: DecodingConfig | None = None,
        on_step: Callable[[DecodingStep], object] | None = None,
    ) -> list[Edited]:
        """Regenerate parts of a recording: regions, a continuation, a loop.

        Args:
            wav: the recording, `channels samples`, with 1 or 2 channels.
            sample_rate: sample rate of the recording and the result, in Hz.
            edit: what to regenerate.
            prompts: one caption, or several with their start in seconds.
            seed: seed of the noise; variation i uses seed + i.
            variations: number of results.
            decoding: decoding settings (default: the model's).
            on_step: called after every step.

        Returns:
            The results; samples outside of regenerated parts equal the recording's.

        Raises:
            UserError: if the edit does not match the recording or the model.
        """
        facts = self.codec.facts
        plan = edit.plan(
            wav.shape[1], sample_rate, facts.frame_rate, facts.num_codebooks, self.crop_s
        )
        cues = [(0.0, prompts)] if isinstance(prompts, str) else list(prompts)
        frames = [round(at_s * facts.frame_rate) for at_s, _ in cues]
        frames[0] = 0  # the first prompt also applies before its start
        texts = [(frame, [text]) for frame, (_, text) in zip(frames, cues, strict=True)]
        original, codes, onsets = self._read(wav, sample_rate, edit, plan)
        samples_per_frame = sample_rate / facts.frame_rate
        if plan.is_loop:  # the codec's frames fill the loop
            samples_per_frame = plan.num_samples / len(plan.to_decode)
        join = Join(
            original=original,
            to_decode=plan.to_decode,
            num_samples=plan.num_samples,
            samples_per_frame=samples_per_frame,
            fade=int(SEAM_S * sample_rate),
            block=round(BLOCK_S * facts.frame_rate),
            is_loop=plan.is_loop,
        )
        results = []
        for own_seed in range(seed, seed + variations):
            given = edit.given(
                plan, facts.num_codebooks, facts.frame_rate, onsets, str(own_seed)
            ).to(self.device)[None]
            made, steps = self.fill(
                codes, given, texts, own_seed, ["edit"], decoding, plan.is_loop, on_step
            )
            results.append(
                Edited(made[0], given[0], steps[0], own_seed, sample_rate, join, self.codec)
            )
        return results

    def _read(
        self, wav: Tensor, sample_rate: int, edit: Edit, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The kept recording `c n`, its codes `1 k t` (zero after its end), and its onsets."""
        facts, num_frames = self.codec.facts, len(plan.to_decode)
        wav = wav[:, plan.start :]
        if plan.is_loop:
            wav = wav[:, : plan.num_samples]
            wav = torch.nn.functional.pad(wav, (0, plan.num_samples - wav.shape[1]))
            resampled = resample_loop(wav, num_frames * facts.hop_samples)
        else:
            resampled = resample(wav, sample_rate, facts.sample_rate)
        known = encode_blocks(self.codec, resampled, plan.is_loop)[..., :num_frames].to(self.device)
        codes = torch.zeros(1, facts.num_codebooks, num_frames, dtype=torch.long).to(self.device)
        codes[..., : known.shape[2]] = known
        onsets = None
        if edit.hints.hint_onsets_s is not None:
            onsets = onset_frames(resampled.mean(0), facts.hop_samples, num_frames)
        if edit.from_s is not None:
            wav = wav[:, : round(edit.from_s * sample_rate)]
        return wav, codes, onsets

    def _networks(self, prompts: Sequence[str], config: DecodingConfig) -> Networks:
        """The conditional pass, and the pass with the negative prompt or null condition."""
        reading = None
        if config.rescorer is not None:
            reading = self._rescorer(config.rescorer).reading(prompts)
        negatives = [config.negative_prompt] * len(prompts)
        text, negative = self._text(prompts, config), self._text(negatives, config)
        if text is not negative and self._joins_passes(config):
            both = self._text([*prompts, *negatives], config)
            return Networks(self._forward(text), rescorer=reading, joint=self._joint(both))
        # audiocraft's remasking needs logits at all frames; on a GPU, the cache would wait for it.
        reuses = self.device.type == "cpu" and not (config.reference_compat or self._is_compiled)
        one_pass = partial(CachedForward, self.network) if reuses else self._forward
        return Networks(one_pass(text), None if text is negative else one_pass(negative), reading)

    def _joins_passes(self, config: DecodingConfig) -> bool:
        """Whether text and null condition share a pass: on a GPU, which large batches fill better.

        A CPU gains nothing, and reuses what did not change between steps for each by itself.
        """
        is_guided = {*as_tuple(config.max_cfg_coef), *as_tuple(config.min_cfg_coef)} != {1}
        return is_guided and self.device.type != "cpu"

    def _joint(self, text: TextKeyValues | None) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """The passes of both halves of `text`, in one."""
        run = self._forward(text)

        def joint(codes: Tensor, stage: int) -> tuple[Tensor, Tensor]:
            with_text, without = run(codes.repeat(2, 1, 1), stage).chunk(2)
            return with_text, without

        return joint

    def _text(self, prompts: Sequence[str], config: DecodingConfig) -> TextKeyValues | None:
        """Keys and values of captions, computed once per window; None = no text."""
        if not any(prompt.strip() for prompt in prompts):
            return None
        states, tokens = (x.to(self.device) for x in self.text_encoder(list(prompts)))
        text = self.network.encode_text(states.to(self.network.head.dtype), tokens)
        if config.reference_compat:  # audiocraft attends to padding of captions
            text = replace(text, allowed=text.allowed.any(1)[:, None].expand_as(text.allowed))
        return text

    def _forward(self, text: TextKeyValues | None) -> Network:
        """The pass with a text; without text, cross-attention is skipped."""

        def run(codes: Tensor, stage: int) -> Tensor:
            if self._is_compiled:  # earlier logits may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            return self._pass(codes, self.network.config.stage(stage), text)

        return run

    def _rescorer(self, name: str) -> Rescorer:
        """The rescorer, loaded at first use."""
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
        prompt_codes: Tensor | None = None,
        **settings: Any,
    ) -> Iterator[DecodedItem]:
        """Generate audio for many items in batches.

        The last batch is filled up with empty captions, because another batch size could round
        differently, and codes would depend on how items are split over devices.

        Args:
            captions: captions by item id.
            batch_size: items per batch.
            seed: seed of the noise, which is a function of (seed, id) for each item.
            decoding: decoding settings (default: the model's).
            duration_s: length in seconds (default: the trained length).
            max_seconds: no batch starts after this time; the remaining items are skipped.
            prompt_codes: `1 k t`, beginning that every item continues.
            settings: `loop` and `on_step`, as in `generate`.

        Yields:
            One result per item, in order.
        """
        start = time.monotonic()
        keys = list(captions)
        if prompt_codes is not None:
            prompt_codes = prompt_codes.expand(batch_size, -1, -1)
        for first in range(0, len(keys), batch_size):
            if max_seconds is not None and time.monotonic() - start > max_seconds:
                return
            batch = keys[first : first + batch_size]
            padding = batch_size - len(batch)
            prompts = [captions[key] for key in batch] + [""] * padding
            ids = batch + ["padding"] * padding
            result = self.generate(
                prompts, seed, ids, duration_s, decoding, prompt_codes, **settings
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
        """Write a release: `config.json`, `model.safetensors`, `README.md`, and the codec if it is
        a folder.

        Args:
            out: folder; must be empty or not exist.
            card: README.md (default: with provenance, licence and usage).

        Raises:
            UserError: if `out` is not empty.
        """
        trained = SavedModel(
            Path(out),
            self.network.config,
            self.codec.facts.to_dict(),
            self.text_encoder.id,
            self.crop_s,
            self.decoding,
            self.guidance_dropout,
            self.provenance,
        )
        weights = self.network.state_dict()
        write_release(
            Path(out), trained, {k: lambda v=v: v.cpu() for k, v in weights.items()}, card
        )


def numbered(names: Sequence[str]) -> list[str]:
    """Make names unique by numbering repetitions.

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
    lora: Sequence[str] = (),
) -> Generator:
    """Load a model from a release folder, hub id, Lightning checkpoint, or run folder.

    Args:
        path: folder, file or hub id; "demo" for the bundled model. A run folder means its newest
            checkpoint.
        device: device of the model.
        dtype: data type of the network's weights; bfloat16 gives other codes than float32.
        compiled: see `Generator`.
        lora: folders of LoRA adapters to merge, each optionally with `:STRENGTH`.

    Raises:
        UserError: if there is no usable model; the message names the file.
    """
    trained = SavedModel.open(path).with_adapters(lora)
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
