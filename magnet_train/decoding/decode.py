"""Iterative decoding: stage by stage, in a few parallel steps each (MAGNeT, Sec. 3).

Each step masks the spans with the lowest scores again, runs the network, samples the masked frames
and scores them. The networks are callables, so that a lambda can test the loop. The loop does not
wait for the device between steps.

The network's input looks as in training: the codebooks above the stage are masked everywhere,
including given codes, which are restored when their stage starts.

Shapes: b examples, k codebooks, t frames, c entries, n steps. Masks are bool, True = to be
predicted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.randomness import generator_for
from magnet_train.common.ranges import as_tuple, check_types, check_values, per_codebook
from magnet_train.decoding import audiocraft_compat
from magnet_train.decoding.remask import remask_grid, remask_sliding
from magnet_train.decoding.rescoring import Reading, mixed_certainty
from magnet_train.decoding.sampling import sample, share_noise

Network = Callable[[Tensor, int], Tensor]
"""Codes `b k t` and a stage -> logits `b t c` of that stage's codebook."""


class Networks(NamedTuple):
    """The passes that decoding runs in each step."""

    conditional: Network
    null: Network | None = None
    """Pass without text, for guidance; None = no guidance at any coefficient."""
    rescorer: Reading | None = None
    """Logits of another model after each step (rescoring.py); None = no rescoring."""
    joint: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    """Both passes in one, which replaces them, for a GPU: `b k t` -> two logits `b t c`."""

    def wrapped(self, wrap: Callable[[Any], Any]) -> "Networks":
        """These networks with each pass replaced by `wrap` of it; the rescorer stays."""
        passes = {name: getattr(self, name) for name in ("conditional", "null", "joint")}
        return self._replace(**{k: wrap(run) for k, run in passes.items() if run is not None})


def _at_step(value: float | tuple[float, ...], step: int) -> float:
    """The value at a step; the last one is repeated for further steps."""
    numbers = as_tuple(value)
    return numbers[min(step, len(numbers) - 1)]


PER_STAGE = ("decoding_steps", "max_cfg_coef", "min_cfg_coef", "shared_noise", "top_p")
"""Decoding settings that may have one number per stage; the last is repeated for further stages."""

SAME_IN_AUDIOCRAFT = ("max_cfg_coef", "min_cfg_coef", "top_p")
"""Those of which audiocraft has one number for all stages."""


@dataclass(frozen=True)
class DecodingConfig:
    """Decoding settings. Without a model, the defaults are those of published 10-second music."""

    decoding_steps: tuple[int, ...] = (20, 10, 10, 10)
    """Number of steps of each stage, stage 0 first; the last number is repeated for further stages.
    """
    temperature: float = 3.0
    """Softmax temperature at the first step of a stage; annealed to 0 unless anneal_temperature is
    false.
    """
    anneal_temperature: bool = True
    """Anneal the temperature linearly to 0 over the steps of a stage."""
    top_p: float | tuple[float, ...] = 0.9
    """Nucleus (top-p) threshold in (0, 1]; 0 disables it. Takes precedence over top_k. One number,
    or one per stage; the last is repeated for further stages.
    """
    top_k: int = 0
    """Sample only from this number of most likely entries; 0 = all."""
    greedy: bool = False
    """Take the most likely entry instead of sampling."""
    max_cfg_coef: float | tuple[float, ...] = 10.0
    """Guidance coefficient while all frames are masked; 1 = no guidance. One number, or one per
    stage; the last is repeated for further stages.
    """
    min_cfg_coef: float | tuple[float, ...] = 1.0
    """Guidance coefficient at the end of a stage; 1 = no guidance. One number, or one per stage;
    the last is repeated for further stages.
    """
    negative_prompt: str = ""
    """Caption to guide away from, instead of the null condition."""
    span_len: int = 3
    """Length of masked spans, in frames; use the value of training."""
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    """Spans start on a fixed grid (nonoverlap) or at every frame (stride1; always scored by prod).
    """
    span_scoring: Literal["max", "prod", "random"] = "max"
    """Score of a span: probability of its most likely code (max), product over its codes (prod), or
    random.
    """
    order_temperature: float = 0.0
    """Scale of Gumbel noise on the spans' scores, annealed to 0 within a stage; 0 = none."""
    second_lap: float = 0.0
    """Share of stage 0's spans to decode again after the last stage, least certain first, with all
    codebooks above them. This second lap takes the same share of the steps; 0 = no second lap.
    """
    shared_noise: int | tuple[int, ...] = 1
    """Length of groups of frames that share their sampling noise; 1 = independent noise. One
    number, or one per stage; the last is repeated for further stages. Groups shift from step to
    step.
    """
    autoregressive_s: float = 0.0
    """Length of a hybrid's autoregressive beginning, in seconds; the rest is decoded in parallel. A
    MusicGen decodes all frames autoregressively.
    """
    autoregressive_temperature: float = 1.0
    """Softmax temperature of autoregressive decoding."""
    autoregressive_top_k: int = 250
    """Autoregressive decoding samples from this number of most likely entries; 0 = all."""
    autoregressive_cfg_coef: float = 3.0
    """Guidance coefficient of autoregressive decoding; 1 = no guidance."""
    rescorer: str | None = None
    """Second model for scoring spans (paper, Eq. 5): another MAGNeT (release, hub id, checkpoint or
    run; RUN@raw for its raw weights) or a MusicGen (folder or hub id for transformers).
    """
    rescorer_weight: float | tuple[float, ...] = 0.5
    """Weight of the rescorer's probabilities, 0 (ignored) to 1 (only the rescorer). One number, or
    one per step of a stage; the last is repeated for further steps.
    """
    rescorer_temperature: float | tuple[float, ...] = 1.0
    """Softmax temperature of the rescorer; one number, or one per step of a stage."""
    rescore_stages: tuple[int, ...] | None = None
    """Stages in which the rescorer is used (default: all)."""
    reference_compat: bool = False
    """Reproduce audiocraft's decoding exactly, including its bugs (audiocraft_compat.py)."""

    def __post_init__(self) -> None:
        check_values(
            self,
            decoding_steps="[1, 10000] steps per stage",
            temperature="(0, inf)",
            top_p="[0, 1]",
            top_k="[0, inf)",
            max_cfg_coef="[0, inf)",
            min_cfg_coef="[0, inf)",
            span_len="[1, inf)",
            order_temperature="[0, inf)",
            second_lap="[0, 1)",
            shared_noise="[1, inf)",
            autoregressive_s="[0, inf) seconds",
            autoregressive_temperature="(0, inf)",
            autoregressive_top_k="[0, inf)",
            autoregressive_cfg_coef="[0, inf)",
            rescorer_weight="[0, 1]",
            rescorer_temperature="(0, inf)",
            rescore_stages="[0, inf)",
        )
        if self.reference_compat and self._is_unpublished:
            raise UserError("reference_compat=True must be false with the other decoding settings")

    @property
    def _is_unpublished(self) -> bool:
        """Whether any setting is used that audiocraft does not have."""
        return (
            self.span_scoring == "random"
            or self.order_temperature > 0
            or max(as_tuple(self.shared_noise)) > 1
            or any(isinstance(getattr(self, name), tuple) for name in SAME_IN_AUDIOCRAFT)
            or self.rescorer is not None
            or self.second_lap > 0
            or self.negative_prompt != ""
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecodingConfig":
        """From JSON or YAML, where tuples are lists.

        Ignores `cache_frames` of models saved before reuse between steps was exact.

        Raises:
            UserError: if a value is of another type or out of range.
            TypeError: if a name is unknown.
        """
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in values.items()
            if k != "cache_frames"
        }
        config = cls(**settings)
        check_types(config)
        return config

    def updated(self, given: Mapping[str, Any]) -> "DecodingConfig":
        """These settings, with the given ones in place of their own.

        Raises:
            UserError, TypeError: as `from_dict`.
        """
        return self.from_dict(asdict(self) | dict(given))

    def rescores(self, stage: int) -> bool:
        """Whether a rescorer, if there is one, is used in this stage."""
        return self.rescore_stages is None or stage in self.rescore_stages

    def per_stage(self, name: str, num_codebooks: int) -> tuple[Any, ...]:
        """A setting of `PER_STAGE` as one number for each of `num_codebooks` stages.

        Raises:
            UserError: if there are more numbers than stages.
        """
        return per_codebook(name, getattr(self, name), num_codebooks)

    def guidance(self, stage: int, num_codebooks: int) -> tuple[float, float]:
        """Guidance coefficients of a stage: while all frames are masked, and at its end."""
        starts = self.per_stage("max_cfg_coef", num_codebooks)
        ends = self.per_stage("min_cfg_coef", num_codebooks)
        return starts[stage], ends[stage]

    def laps(self, num_codebooks: int) -> list[tuple[int, ...]]:
        """Steps of each stage in each lap: one lap, or two with `second_lap`."""
        steps = self.per_stage("decoding_steps", num_codebooks)
        if self.second_lap == 0:
            return [steps]
        return [steps, tuple(max(1, round(self.second_lap * n)) for n in steps)]

    def num_steps(self, num_codebooks: int) -> int:
        """Steps of all stages and laps."""
        return sum(map(sum, self.laps(num_codebooks)))


@dataclass(frozen=True)
class DecodingStep:
    """Argument of `on_step` after every step."""

    stage: int
    index: int
    """Index of the step in its stage, from 0."""
    masked: Tensor
    """`b t`, frames that this step predicted."""
    codes: Tensor
    """`b k t`, after the step."""


class ItemNoise(NamedTuple):
    """Uniform noise in [0, 1) for each item: `b n t` each, n steps of all stages."""

    codes: Tensor
    """Noise for sampling codes."""
    order: Tensor
    """Noise for the order of spans."""

    def split(self, num_steps: Sequence[int]) -> "list[ItemNoise]":
        """Noise of consecutive parts of so many steps each."""
        parts = (x.split(list(num_steps), dim=1) for x in self)
        return [ItemNoise(*part) for part in zip(*parts, strict=True)]


def item_noise(seed: int, items: Sequence[str], num_steps: int, num_frames: int) -> ItemNoise:
    """Noise of each item from a generator seeded by (seed, item).

    So an item gets the same codes in any batch, on any rank and number of GPUs.
    """
    codes, order = [], []
    for item in items:
        generator = generator_for(f"{seed}/{item}")
        codes.append(torch.rand(num_steps, num_frames, generator=generator))
        order.append(torch.rand(num_steps, num_frames, generator=generator))
    return ItemNoise(torch.stack(codes), torch.stack(order))


@torch.no_grad()
def decode(
    networks: Networks,
    codes: Tensor,
    given: Tensor,
    codebook_size: int,
    config: DecodingConfig,
    noise: ItemNoise,
    on_step: Callable[[DecodingStep], None] | None = None,
) -> Tensor:
    """Decode all stages, lowest codebook first: `b k t` -> `b k t` without mask ids.

    Args:
        networks: the passes to run.
        codes: codes to keep where `given`; ignored elsewhere.
        given: `b k t` or `b t` (the same for all codebooks), True = kept. If it is on the CPU,
            stages that are given entirely are skipped; on a GPU that would wait for the device.
        codebook_size: c; the mask id is c.
        config: decoding settings.
        noise: from `item_noise`; n is the sum of all stages' steps.
        on_step: called after every step.

    Raises:
        UserError: if the steps do not fit the codebooks, or no span fits the frames of audiocraft's
            decoding.
    """
    given = given[:, None].expand_as(codes) if given.dim() == 2 else given
    skips = given.all(2).all(0).tolist() if given.device.type == "cpu" else [False] * given.shape[1]
    given = given.to(codes.device)
    noise = ItemNoise(noise.codes.to(codes.device), noise.order.to(codes.device))
    if config.reference_compat and config.span_arrangement == "nonoverlap":
        end = codes.shape[2] // config.span_len * config.span_len
        if end == 0:
            raise UserError(
                f"reference_compat=true: {codes.shape[2]} frames are shorter than a span of "
                f"{config.span_len}; generate more, or set a smaller span_len"
            )
        codes, given = codes[..., :end], given[..., :end]
        noise = ItemNoise(*(x[..., :end] for x in noise))
    run = _Run(networks, codebook_size, config, on_step)
    laps, certainty = config.laps(codes.shape[1]), torch.empty(())
    of_laps = noise.split([sum(steps) for steps in laps])
    for lap, (steps, lap_noise) in enumerate(zip(laps, of_laps, strict=True)):
        if lap == 1:
            given = given | ~_least_certain(certainty, given[:, 0], config, noise)[:, None]
        codes, certainty = run.decode_lap(codes, given, lap_noise.split(steps), skips)
    return codes


def circular(networks: Networks, num_frames: int, context: int) -> Networks:
    """Networks for a loop: each end is extended by `context` frames of the other end.

    If no frame attends farther than that, logits are shift-equivariant, so the loop has no seam.
    """
    index = torch.arange(-context, num_frames + context) % num_frames

    def wrapped(network: Any) -> Any:
        def run(codes: Tensor, stage: int) -> Any:
            found = network(codes[..., index.to(codes.device)], stage)
            if isinstance(found, Tensor):
                return found[:, context : context + num_frames]
            return tuple(logits[:, context : context + num_frames] for logits in found)

        return run

    return networks.wrapped(wrapped)


def with_beginning(networks: Networks, codes: Tensor, beginning: Tensor) -> Networks:
    """Networks that see the codes `b k t` of a hybrid's beginning in all stages, as in training.

    `beginning` is True there, bool `k t`. Other codes above the stage stay hidden.
    """

    def wrapped(network: Any) -> Any:
        return lambda shown, stage: network(torch.where(beginning, codes, shown), stage)

    return networks.wrapped(wrapped)


def _least_certain(
    certainty: Tensor, given: Tensor, config: DecodingConfig, noise: ItemNoise
) -> Tensor:
    """Frames of the second lap, from the certainty of their stage-0 codes: `b t` -> bool `b t`."""
    scoring = "prod" if config.span_scoring == "random" else config.span_scoring
    share = torch.tensor(config.second_lap)
    return remask_grid(
        certainty, ~given, given, share, config.span_len, scoring, noise.order[:, -1]
    )


def guided_logits(
    networks: Networks, codes: Tensor, stage: int, config: DecodingConfig, share: float
) -> Tensor:
    """Logits `b t c` with classifier-free guidance; its coefficient depends on the masked share
    (Sec. 3.4).
    """
    start, end = config.guidance(stage, codes.shape[1])
    coef = share * start + (1 - share) * end
    if networks.joint is not None and (start, end) != (1, 1):
        logits, null = networks.joint(codes, stage)
    elif networks.null is not None and coef != 1:
        logits, null = networks.conditional(codes, stage), networks.null(codes, stage)
    else:
        return networks.conditional(codes, stage)
    return null + (logits - null) * coef


@dataclass(frozen=True)
class _Run:
    """Networks and settings that stay the same during one call of `decode`."""

    networks: Networks
    mask_id: int
    config: DecodingConfig
    on_step: Callable[[DecodingStep], None] | None

    def decode_lap(
        self, codes: Tensor, given: Tensor, noise: Sequence[ItemNoise], skips: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Decode all stages once; also returns the certainty of the stage-0 codes, `b t`.

        `noise` is that of each stage; `skips` says which are skipped because all their codes are
        given.
        """
        known = torch.where(given, codes, self.mask_id)
        shown = known if self.config.reference_compat else torch.full_like(codes, self.mask_id)
        certainties = []
        for stage, (stage_noise, is_skipped) in enumerate(zip(noise, skips, strict=True)):
            shown = shown.clone()  # on_step may have kept the last one
            shown[:, stage] = known[:, stage]
            if is_skipped:
                certainties.append(torch.ones(given[:, stage].shape, device=codes.device))
                continue
            shown, certainty = self._decode_stage(shown, given[:, stage], stage, stage_noise)
            certainties.append(certainty)
        return shown, certainties[0]

    def _decode_stage(
        self, codes: Tensor, given: Tensor, stage: int, noise: ItemNoise
    ) -> tuple[Tensor, Tensor]:
        """Decode codebook `stage` where not `given` (`b t`), in as many steps as the noise has.

        Also returns the certainty of each frame, `b t`, at the step that decided it.
        """
        config, num_steps = self.config, noise.codes.shape[1]
        num_sharing = config.per_stage("shared_noise", codes.shape[1])[stage]
        top_p = config.per_stage("top_p", codes.shape[1])[stage]
        masked, certainty = ~given, torch.empty(())
        decided = torch.ones(given.shape, device=codes.device)
        # Rounded as in audiocraft: the number of spans is this share of them, rounded down.
        shares = torch.cos(torch.linspace(0, 1, num_steps) * math.pi * 0.5)
        if not config.reference_compat:  # otherwise guidance would end beyond its minimum, at -4e-8
            shares = shares.clamp(min=0)
        for step, share in enumerate(shares):
            if step > 0:
                masked = self._remask(certainty, masked, given, share, noise.order[:, step])
            row = codes[:, stage]
            masked_codes = codes.clone()
            masked_codes[:, stage] = torch.where(masked, self.mask_id, row)
            logits = guided_logits(self.networks, masked_codes, stage, config, float(share)).float()
            left = (num_steps - step - 1) / num_steps if config.anneal_temperature else 1.0
            temperature = max(config.temperature * left, 1e-2)
            own_noise = share_noise(noise.codes[:, step], num_sharing, noise.order[:, step, -1])
            chosen, certainty = self._chosen(logits, masked, temperature, top_p, own_noise)
            codes = masked_codes.clone()
            codes[:, stage] = torch.where(masked, chosen, row)
            if self.networks.rescorer is not None and config.rescores(stage):
                certainty = mixed_certainty(
                    certainty,
                    self.networks.rescorer(codes, masked, stage),
                    chosen,
                    _at_step(config.rescorer_weight, step),
                    _at_step(config.rescorer_temperature, step),
                )
            decided = torch.where(masked, certainty, decided)
            if self.on_step is not None:
                self.on_step(DecodingStep(stage, step, masked, codes))
        return codes, decided

    def _chosen(
        self, logits: Tensor, masked: Tensor, temperature: float, top_p: float, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample an entry for each frame from `b t c`; returns entries and their probabilities,
        `b t`.

        On a CPU only at `masked` frames, and 0 elsewhere; on a GPU that would wait for the device,
        and audiocraft's remasking also looks at the others.
        """
        some = logits.device.type == "cpu" and not self.config.reference_compat
        if some:
            logits, noise = logits[masked], noise[masked]
        probs = torch.softmax(logits / temperature, dim=-1)
        if self.config.greedy:
            chosen = logits.argmax(-1)
        else:
            chosen = sample(probs, top_p, self.config.top_k, noise)
        certainty = probs.gather(-1, chosen[..., None])[..., 0]
        if some:
            chosen = torch.zeros(masked.shape, dtype=torch.long).masked_scatter_(masked, chosen)
            certainty = torch.zeros(masked.shape).masked_scatter_(masked, certainty)
        return chosen, certainty

    def _remask(
        self, certainty: Tensor, masked: Tensor, given: Tensor, share: Tensor, order_noise: Tensor
    ) -> Tensor:
        """Frames to mask again, from `certainty` and `masked` of the last step: `b t` -> bool
        `b t`.
        """
        config, frames = self.config, (certainty, masked, given, share)
        on_grid = config.span_arrangement == "nonoverlap"
        if config.reference_compat and on_grid:
            return audiocraft_compat.remask_grid(*frames, config.span_len, config.span_scoring)
        if config.reference_compat:
            return audiocraft_compat.remask_sliding(*frames, config.span_len)
        remask = remask_grid if on_grid else remask_sliding
        scale = config.order_temperature * float(share)
        return remask(*frames, config.span_len, config.span_scoring, order_noise, scale)
