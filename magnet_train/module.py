"""LightningModule: MAGNeT's training objective, validation loss and optimizer."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from magnet_train.adapters import (
    LoraConfig,
    adapt,
    adapter_tensors,
    draw_dropout,
    lora_settings,
    weights_hash,
    write_adapter,
)
from magnet_train.codec.base import absolute_name, load_codec, load_codec_facts
from magnet_train.common import private_api
from magnet_train.common.devices import to_device
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import absolute_path
from magnet_train.common.randomness import generator_for
from magnet_train.common.ranges import as_tuple, check_values, per_codebook
from magnet_train.conditioning import TextEncoder, drop_captions, load_text_encoder
from magnet_train.data.pipeline import Batch
from magnet_train.layout import prompt_frames
from magnet_train.loss import (
    MaskedLoss,
    balanced_mean,
    masked_cross_entropy,
    masked_divergence,
)
from magnet_train.masking import cosine_mask_rate, span_mask, span_mask_behind
from magnet_train.metrics.baselines import copy_nearest
from magnet_train.metrics.fixed_masks import FixedMaskMetrics, fixed_span_mask
from magnet_train.model import Magnet, MagnetConfig, Pass
from magnet_train.optimizer import OptimizerConfig, allows_fused, make_optimizer, schedule_factor
from magnet_train.release import MAX_CROP_S, SavedModel, initial_weights, widens_to_stereo
from magnet_train.resume import check_same_model, differing
from magnet_train.sharding import check_shardable, full_tensor, is_sharded, shard, unsharded_copy

Stages = list[tuple[int, list[int]]]
"""Stages of a batch, in ascending order, with the rows of each."""


def step_generator(seed: int, *place: int) -> torch.Generator:
    """Random numbers of one place in a run (batch, rank …), whatever was drawn before."""
    return generator_for(repr((seed, *place)))


def checked_stage_weights(
    weights: tuple[float, ...] | None, num_codebooks: int
) -> tuple[float, ...] | None:
    """Relative frequencies of the stages, one number each; None = all equal.

    Raises:
        UserError: if a number is negative or too large, or all are 0.
    """
    if weights is None:
        return None
    check_values({"stage_weights": weights}, stage_weights="[0, 1000000]")
    if sum(weights) < 1e-6:
        raise UserError(f"stage_weights={list(weights)}: one must be above 1e-6")
    return per_codebook("stage_weights", tuple(map(float, weights)), num_codebooks)


def load_teacher(start: SavedModel | None, network: MagnetConfig) -> Magnet:
    """Load the teacher for guidance distillation.

    Raises:
        UserError: if there is no model with order=parallel, or it is decoded without guidance.
    """
    if (
        start is None
        or network.order != "parallel"
        or start.network.num_codebooks != network.num_codebooks
    ):
        raise UserError(
            "distil_guidance=true needs a model with order=parallel and the same codec to distil; "
            "give --model.init_from RELEASE"
        )
    coefs = (start.decoding.max_cfg_coef, start.decoding.min_cfg_coef)
    if {number for coef in coefs for number in as_tuple(coef)} == {1}:
        raise UserError(
            f"{start.file}: distil_guidance=true: its decoding settings have no guidance to distil "
            "(max_cfg_coef and min_cfg_coef are 1)"
        )
    return start.build().requires_grad_(False)


def check_lora(lora: LoraConfig, init_from: str | None, distil_guidance: bool) -> None:
    """Whether an adapter has a model to be trained on.

    Raises:
        UserError: if not, or if it would be distilled.
    """
    if lora.rank and (init_from is None or distil_guidance):
        raise UserError(f"--lora.rank {lora.rank}: needs --model.init_from and no distillation")


def initial_provenance(start: SavedModel | None) -> dict[str, Any]:
    """Origin and licence of the initial weights; empty for random ones."""
    if start is None:
        return {}
    return {name: start.provenance.get(name) for name in ("licence", "base_model", "source")}


class MagnetModule(L.LightningModule):
    """MAGNeT: network and training objective (Sec. 3)."""

    def __init__(  # noqa: PLR0913  each is an option of the command line
        self,
        network: MagnetConfig = MagnetConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        codec: str = "demo",
        text_encoder: str = "demo",
        crop_s: float = 10.0,
        span_len: int = 3,
        more_span_lens: tuple[int, ...] = (),
        beginning_share: float = 0.0,
        prompt_weight: float = 1.0,
        guidance_dropout: float = 0.3,
        stage_sampling: Literal["batch", "example"] = "batch",
        stage_weights: tuple[float, ...] | None = None,
        start_from_codec: bool = False,
        init_from: str | None = None,
        distil_guidance: bool = False,
        lora: LoraConfig = LoraConfig(),
        compiled: bool = False,
        seed: int = 2036,
    ):
        """
        Args:
            network: Architecture of the network; codebooks and text width follow from codec and
                text encoder.
            optimizer: Optimizer and learning-rate schedule.
            codec: Codec: "demo", or a folder or hub id of an EnCodec; must be the one used for the
                shards.
            text_encoder: Text encoder: "demo", or a folder or hub id of a transformers encoder with
                its tokenizer.
            crop_s: Length of training crops and, by default, of generated audio, in seconds.
            span_len: Length of masked spans, in frames; 3 frames are 60 ms at 50 Hz.
            more_span_lens: Further span lengths, in frames; each batch draws one of span_len and
                these, with equal chance. Validation and decoding use span_len.
            beginning_share: Share of examples whose beginning, of random length, stays visible, 0
                to 1 (published: 0). Trains continuation. Ignored for other orders than parallel.
            prompt_weight: Weight of the codes in a hybrid's autoregressive beginning relative to
                masked ones, at least 0. At 1, as in audiocraft, the beginnings have about six times
                the total weight of the masked codes. Ignored for order=parallel.
            guidance_dropout: Share of examples trained without their caption, for classifier-free
                guidance, 0 to 1.
            stage_sampling: "batch" trains one stage per optimizer step, as published; "example"
                draws a stage for each example and runs one forward pass per stage drawn.
            stage_weights: Relative frequency of each stage in training, stage 0 first; the last
                number is repeated for further stages (default: all equal, as published).
            start_from_codec: Initialise embeddings and heads from the codec's codebooks
                (non-standard; helps short runs).
            init_from: Start from these weights (release folder, hub id, checkpoint or run folder).
                Their network, codec, text encoder, lengths and decoding settings become the
                defaults.
            distil_guidance: Distil the guided logits of init_from, so that decoding needs no null
                pass and takes half the time. Uses the guidance coefficients of its decoding
                settings.
            lora: LoRA adapters to train instead of all weights; needs init_from. `--lora.rank 8` is
                short for `--model.lora.rank 8`.
            compiled: Compile the transformer's blocks, for GPUs. The first steps then take a minute
                or more.
            seed: Seed of initial weights, masks and dropout.
        """
        super().__init__()
        check_values(
            {
                "span_len": (span_len, *more_span_lens),
                "crop_s": crop_s,
                "guidance_dropout": guidance_dropout,
                "beginning_share": beginning_share,
                "prompt_weight": prompt_weight,
            },
            span_len="[1, inf)",
            crop_s=f"(0, {MAX_CROP_S}] seconds",
            guidance_dropout="[0, 1]",
            beginning_share="[0, 1]",
            prompt_weight="[0, inf)",
        )
        if stage_sampling not in ("batch", "example"):
            raise UserError(f"stage_sampling={stage_sampling}: choose batch or example")
        stage_weights = checked_stage_weights(stage_weights, network.num_codebooks)
        if init_from is not None and start_from_codec:
            raise UserError(
                f"init_from={init_from} and start_from_codec=true: choose one to start from"
            )
        check_lora(lora, init_from, distil_guidance)
        start = None if init_from is None else SavedModel.open(init_from)
        # In a tuple, so that it enters neither checkpoints nor the optimizer.
        self._teacher: tuple[Magnet, ...] = ()
        if distil_guidance:
            self._teacher = (load_teacher(start, network),)
        self._teacher_decoding = None if start is None else start.decoding
        # A run may be resumed from another working directory.
        codec, text_encoder = absolute_name(codec), absolute_path(text_encoder)
        # Plain values, so that a checkpoint loads without unpickling classes of ours.
        self.save_hyperparameters(
            {
                "network": asdict(network),
                "optimizer": asdict(optimizer),
                "codec": codec,
                "text_encoder": text_encoder,
                "crop_s": crop_s,
                "span_len": span_len,
                "more_span_lens": list(more_span_lens),
                "beginning_share": beginning_share,
                "prompt_weight": prompt_weight,
                "guidance_dropout": guidance_dropout,
                "stage_sampling": stage_sampling,
                "stage_weights": stage_weights,
                "start_from_codec": start_from_codec,
                "init_from": absolute_path(init_from)
                if init_from and (lora.rank or distil_guidance)
                else init_from,
                "lora": lora_settings(lora, None),
                "distil_guidance": distil_guidance,
                "seed": seed,
            }
        )
        self.init_provenance = initial_provenance(start)
        self.config, self.optimizer_config = network, optimizer
        self.trained_steps = 0
        """Optimizer steps of the loaded checkpoint, if the trainer does not know them."""
        self.lora = lora
        self.span_len = span_len
        self.guidance_dropout = guidance_dropout
        self.seed = seed
        self.crop_s = crop_s
        self.prompt_weight = prompt_weight
        self.beginning_share = beginning_share
        self.span_lens = (span_len, *more_span_lens)
        """Span lengths; each batch draws one."""
        self.stage_weights = None if stage_weights is None else torch.tensor(stage_weights)
        self.stage_sampling = stage_sampling
        self.codec_name = codec
        self.text_encoder_name = text_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Magnet(network)
        if start is not None:
            self._start_from(start)
        elif start_from_codec:
            self.network.start_from_codebooks(load_codec(codec).codebooks, step_generator(seed))
        if compiled:
            self.network.compile_blocks()
        self.fixed_masks = FixedMaskMetrics(network.num_codebooks)
        self.reading_ce = MeanMetric().set_dtype(torch.float64)
        # In a tuple, so that the frozen encoder enters neither checkpoints nor the optimizer.
        self._frozen: tuple[TextEncoder, ...] = ()
        self._generator: Any = None
        self._unsharded: tuple[Magnet, ...] = ()

    def _start_from(self, start: SavedModel) -> None:
        """Load the initial weights, and add adapters to them if there are any to train."""
        weights = initial_weights(start, self.config, load_codec_facts(self.codec_name))
        self.network.load_state_dict(weights)
        if self.lora.rank:
            if widens_to_stereo(start, self.codec_name):
                raise UserError(
                    f"--model.codec {self.codec_name}: adapters cannot make a mono model stereo; "
                    "train all weights, without --lora.rank"
                )
            adapt(self.network, self.lora, step_generator(self.seed))
            self.hparams["lora"] = lora_settings(self.lora, weights_hash(weights))
            self.strict_loading = False  # checkpoints have only the adapters

    def configure_model(self) -> None:
        """Shard the weights over all ranks under Lightning's ModelParallelStrategy (FSDP2).

        Raises:
            UserError: if a setting does not work with sharded weights.
        """
        if self.device_mesh is None or is_sharded(self.network):
            return
        saves_folders = private_api.saves_distributed_checkpoints(self.trainer)
        check_shardable(str(self.trainer.precision), self.lora.rank, saves_folders)
        shard(self.network, self.device_mesh.device_type)

    def setup(self, stage: str) -> None:
        if not self._frozen:
            self._frozen = (load_text_encoder(self.text_encoder_name),)
        if self.text_encoder.dim != self.config.text_dim:
            raise UserError(
                f"text encoder {self.text_encoder_name!r} has states of width "
                f"{self.text_encoder.dim}, but the network was built for "
                f"text_dim={self.config.text_dim}: use the encoder it was trained with"
            )
        # Lightning moves the module to its device only after this hook.
        trainer = private_api.attached_trainer(self)
        device = self.device if trainer is None else trainer.strategy.root_device
        for frozen in (self.text_encoder, *self._teacher):
            frozen.to(device)

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder; loaded by `setup`."""
        return self._frozen[0]

    @property
    def unsharded(self) -> Magnet:
        """The network; under FSDP2, a copy with all weights during evaluation."""
        return self._unsharded[0] if self._unsharded else self.network

    def stage_loss(
        self, batch: Batch, captions: list[str], stage: int, masked: Tensor
    ) -> MaskedLoss:
        """Loss of a stage under masks `b t` on the host; padded frames are ignored."""
        shown = self._shown(batch["codes"], stage, masked)
        return self._loss(batch, captions, self.config.stage(stage), shown, masked[:, None])

    def hybrid_loss(
        self, batch: Batch, captions: list[str], stage: int, masked: Tensor, steps: Tensor
    ) -> tuple[MaskedLoss, MaskedLoss]:
        """Losses of a stage and of the autoregressive beginnings, from one pass.

        Args:
            batch: codes and valid frames.
            captions: one per example; "" = without text.
            stage: 0 … K-1.
            masked: `b t`, none in the autoregressive beginning.
            steps: `b`, prompt step of each example; rows before it are causal and predict all codes
                of the beginning.
        """
        codes = batch["codes"]
        prompt = prompt_frames(steps, *codes.shape[1:])
        is_shown = to_device(prompt, codes.device)
        shown = torch.where(is_shown, codes, self._shown(codes, stage, masked))
        own, every = self.config.stage(stage), self.config.reading
        causal = to_device(steps, codes.device)
        pass_ = Pass(own.codebooks + every.codebooks, own.context, causal)
        predicted = torch.cat([masked[:, None], prompt], 1)
        loss = self._loss(batch, captions, pass_, shown, predicted)
        return loss[: len(codes)], loss[len(codes) :]

    def reading_loss(self, batch: Batch, captions: list[str]) -> MaskedLoss:
        """Autoregressive loss of all codes in the delay layout."""
        codes = batch["codes"]
        everywhere = torch.ones(codes.shape, dtype=torch.bool)
        return self._loss(batch, captions, self.config.reading, codes, everywhere)

    def distilled_loss(
        self, batch: Batch, captions: list[str], stage: int, masked: Tensor, rates: Tensor
    ) -> MaskedLoss:
        """KL divergence of one stage's single pass from the teacher's guided logits.

        Args:
            batch: codes and valid frames.
            captions: one per example; "" = without text, where guidance has no effect.
            stage: 0 … K-1.
            masked: `b t`.
            rates: `b`, share of frames masked; the guidance coefficient follows it, as in decoding.
        """
        teacher, settings = self._teacher[0], self._teacher_decoding
        assert settings is not None
        shown, pass_ = self._shown(batch["codes"], stage, masked), self.config.stage(stage)
        masked = (masked & batch["valid"])[:, None]
        with torch.no_grad():
            with_text = self._logits(teacher, batch, captions, pass_, shown, masked)
            without = self._logits(teacher, batch, [""] * len(captions), pass_, shown, masked)
            start, end = settings.guidance(stage, self.config.num_codebooks)
            coefs = rates * start + (1 - rates) * end
            of_frames = coefs[masked.nonzero()[:, 0], None]
            coef = to_device(of_frames.to(with_text.dtype), with_text.device)
            guided = without + (with_text - without) * coef
        logits = self._logits(self.unsharded, batch, captions, pass_, shown, masked)
        return masked_divergence(logits, guided, masked[:, 0])

    def _shown(self, codes: Tensor, stage: int, masked: Tensor) -> Tensor:
        """Codes `b k t` without the stage's masked frames and the codebooks above it."""
        shown = codes.clone()
        shown[:, stage].masked_fill_(to_device(masked, codes.device), self.config.mask_id)
        shown[:, stage + 1 :] = self.config.mask_id
        return shown

    def _loss(
        self, batch: Batch, captions: list[str], pass_: Pass, shown: Tensor, masked: Tensor
    ) -> MaskedLoss:
        """Loss at frames `b m t` except padding: of m times b examples, codebook after codebook."""
        masked = masked & batch["valid"][:, None]
        logits = self._logits(self.unsharded, batch, captions, pass_, shown, masked)
        targets = torch.cat([batch["codes"][:, book] for book in pass_.codebooks])
        return masked_cross_entropy(logits, targets, torch.cat(masked.unbind(1)))

    def _logits(
        self,
        network: Magnet,
        batch: Batch,
        captions: list[str],
        pass_: Pass,
        shown: Tensor,
        masked: Tensor,
    ) -> Tensor:
        valid = None
        if not batch["valid"].numpy().all():
            valid = to_device(batch["valid"], shown.device)
            shown = shown.masked_fill(~valid[:, None], self.config.mask_id)
        # Text is encoded even if all captions are dropped, because DDP needs all gradients.
        return network.masked_logits(shown, pass_, self.text_encoder(captions), masked, valid)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        count = self.trainer.fit_loop.epoch_loop.total_batch_idx
        generator = step_generator(self.seed, count, self.global_rank)
        if self.lora.dropout:
            draw_dropout(self.network, self.lora.dropout, step_generator(self.seed, count, -2))
        size, num_frames = batch["valid"].shape
        rates = cosine_mask_rate(torch.rand(size, generator=generator))
        stages = self._drawn_stages(count, size)
        masked, steps = self._draw_masks(rates, stages, num_frames, generator)
        captions = drop_captions(batch["captions"], self.guidance_dropout, generator)
        losses: dict[int, MaskedLoss] = {}
        prompts = []
        for stage, rows in stages:
            part = batch if len(stages) == 1 else _examples(batch, rows)
            given = part, [captions[row] for row in rows], stage, masked[rows]
            if self.config.order != "parallel":
                losses[stage], prompt = self.hybrid_loss(*given, steps[rows])
                prompts.append(prompt)
            elif self._teacher:
                losses[stage] = self.distilled_loss(*given, rates[rows])
            else:
                losses[stage] = self.stage_loss(*given)
        total = MaskedLoss.concatenate(losses.values())
        prompt = MaskedLoss.concatenate(prompts) if prompts else None
        mean = total.mean() if prompt is None else balanced_mean(total, prompt, self.prompt_weight)
        if is_logged(self.trainer, self.trainer.global_step + 1):
            self._log_training(losses, prompt, mean)
        return mean

    def _log_training(
        self, losses: dict[int, MaskedLoss], prompt: MaskedLoss | None, mean: Tensor
    ) -> None:
        """Log a batch of a step that loggers write; in others, the progress bar would wait for the
        device.
        """
        size = sum(len(loss.count) for loss in losses.values())
        for stage, loss in losses.items():
            of_stage = {"ce": loss.mean(), "accuracy": loss.accuracy()}
            for name, value in of_stage.items():
                self.log(f"train/{name}/stage{stage}", value.detach(), batch_size=len(loss.count))
        if prompt is not None:
            self.log("train/ce/prompt", prompt.mean().detach(), batch_size=size)
        self.log("train/loss", mean.detach(), prog_bar=True, batch_size=size)

    def _draw_masks(
        self, rates: Tensor, stages: Stages, num_frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Masked frames, `b t`, and prompt steps, `b` (0 for MAGNeT), both on the host."""
        span_len = self.span_len
        if len(self.span_lens) > 1:
            span_len = self.span_lens[torch.randint(len(self.span_lens), (1,), generator=generator)]
        if self.config.order == "parallel" and self.beginning_share == 0:
            steps = torch.zeros(len(rates), dtype=torch.long)
            return span_mask(rates, num_frames, span_len, generator), steps
        starts, steps = self._draw_beginnings(len(rates), stages, num_frames, generator)
        return span_mask_behind(starts, rates, num_frames, span_len, generator), steps

    def _draw_beginnings(
        self, size: int, stages: Stages, num_frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """First frames that may be masked, and prompt steps, `b` each."""
        if self.config.order == "parallel":
            starts = torch.randint(num_frames, (size,), generator=generator)
            with_beginning = torch.rand(size, generator=generator) < self.beginning_share
            return starts.masked_fill(~with_beginning, 0), torch.zeros(size, dtype=torch.long)
        if self.config.order == "hybrid":
            steps = torch.randint(num_frames, (size,), generator=generator)
        else:  # all rows are causal
            steps = torch.full((size,), num_frames + self.config.num_codebooks)
        stage_of = torch.zeros(size, dtype=torch.long)
        for stage, rows in stages:
            stage_of[rows] = stage
        return (steps - stage_of).clamp(0, num_frames), steps

    def _drawn_stages(self, count: int, size: int) -> Stages:
        """One stage for all batches of an optimizer step, or one for each row of batch `count` of
        the run, from 0; all ranks draw the same, so that they have equal work.
        """
        if self.stage_sampling == "batch":
            number, generator = 1, step_generator(self.seed, self.global_step)
        else:
            number, generator = size, step_generator(self.seed, count, -1)
        if self.stage_weights is None:
            drawn = torch.randint(self.config.num_codebooks, (number,), generator=generator)
        else:
            drawn = torch.multinomial(self.stage_weights, number, True, generator=generator)
        of_rows = drawn.expand(size).tolist()
        return [(k, [i for i in range(size) if of_rows[i] == k]) for k in sorted(set(of_rows))]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        num_frames = batch["valid"].shape[1]
        if self.config.order != "parallel":
            read = self.reading_loss(batch, batch["captions"])
            self.reading_ce.update(read.mean(), read.count.sum())
        if self.config.order == "autoregressive":
            return
        for stage in range(self.config.num_codebooks):
            masks, rates = zip(
                *(fixed_span_mask(key, stage, num_frames, self.span_len) for key in batch["keys"]),
                strict=True,
            )
            masked = torch.stack(masks)
            loss = self.stage_loss(batch, batch["captions"], stage, masked)
            codes = batch["codes"][:, stage]
            is_masked, valid = (to_device(x, codes.device) for x in (masked, batch["valid"]))
            copied = (copy_nearest(codes, is_masked | ~valid) == codes) & is_masked & valid
            rates_drawn = torch.tensor(rates, device=self.device)
            self.fixed_masks.update(stage, rates_drawn, loss, copied.sum(1))

    def on_validation_epoch_start(self) -> None:
        """Runs after the callbacks, so that the unsharded copy has the averaged weights."""
        if is_sharded(self.network):
            self._unsharded = (unsharded_copy(self.network),)

    def on_validation_epoch_end(self) -> None:
        self._unsharded = ()
        self.log_dict(self.fixed_masks.compute())
        self.fixed_masks.reset()
        if self.config.order != "parallel":
            self.log("val/ce/reading", self.reading_ce.compute())
            self.reading_ce.reset()

    test_step = validation_step
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the origin and licence of the initial weights; with LoRA, only the adapters."""
        if self.lora.rank:
            for part in {"state_dict", "current_model_state"} & checkpoint.keys():
                checkpoint[part] = adapter_tensors(checkpoint[part])
        checkpoint["init_provenance"] = {
            k: v for k, v in self.init_provenance.items() if v is not None
        }

    def write_adapter(self, folder: Path) -> None:
        """Write the adapters as PEFT's two files."""
        tensors = adapter_tensors(self.network.state_dict())
        settings = self.hparams["lora"]
        base = str(self.hparams["init_from"])
        write_adapter(folder, tensors, self.lora, base, settings["base_hash"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the origin of the initial weights, and report settings that changed.

        Raises:
            UserError: if the checkpoint has another network or optimizer.
        """
        trainer = private_api.attached_trainer(self)
        if trainer is not None and trainer.state.fn == "fit":
            saved, own = checkpoint["hyper_parameters"], dict(self.hparams)
            check_same_model(saved, own)
            changed = [
                text
                for name, text in differing(saved, own)
                if name not in ("init_from", "start_from_codec")
            ]
            if changed:
                rank_zero_info(
                    f"resuming with settings that differ from the checkpoint: {', '.join(changed)}"
                )
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    if "fused" in group:  # otherwise torch would keep the checkpoint's setting
                        group["fused"] = allows_fused(str(trainer.precision))
        self.init_provenance = dict(checkpoint.get("init_provenance", {}))
        self.trained_steps = int(checkpoint.get("global_step", 0))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if is_logged(self.trainer, self.trainer.global_step + 1):
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            gradients = [p.grad for p in trainable_parameters(self).values() if p.grad is not None]
            norms = [gradient.norm() for gradient in gradients] or [torch.tensor(0.0)]
            self.log("train/grad_norm", full_tensor(torch.linalg.vector_norm(torch.stack(norms))))

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Generate audio for every caption of a batch, with independent noise per item."""
        from magnet_train.decoding.decode import DecodingConfig
        from magnet_train.generator import Generator

        if self._generator is None:
            codec = load_codec(self.codec_name).to(self.device)
            decoding = DecodingConfig(span_len=self.span_len)
            self._generator = Generator(
                self.unsharded, codec, self.text_encoder, decoding, self.crop_s
            )
        result = self._generator.generate(batch["captions"], self.seed, batch["keys"])
        return {"wav": result.wav, "sample_rate": result.sample_rate}

    def on_train_start(self) -> None:
        """Apply the configured optimizer settings again after Lightning restored old ones."""
        settings = self.optimizer_config.settings()
        optimizer = self.trainer.optimizers[0]
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        lr = settings["lr"] * schedule.lr_lambdas[0](schedule.last_epoch)
        schedule.base_lrs = [settings["lr"]]
        private_api.set_last_lr(schedule, lr)
        for group in optimizer.param_groups:
            group |= settings | {"lr": lr, "initial_lr": settings["lr"]}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, also with a fused optimizer in bf16-mixed, which it refuses."""
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        plugin: Any = self.trainer.precision_plugin
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def configure_optimizers(self) -> Any:
        config, trainer = self.optimizer_config, self.trainer
        fused = allows_fused(str(trainer.precision))
        optimizer = make_optimizer(config, list(trainable_parameters(self).values()), fused)
        factor = schedule_factor(config, trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }


def is_logged(trainer: Any, step: int) -> bool:
    """Whether loggers get the values of an optimizer step, counted from 1."""
    number = trainer.log_every_n_steps
    return bool(trainer.fast_dev_run) or (number > 0 and step % number == 0)


def _examples(batch: Any, rows: list[int]) -> Any:
    """Codes and valid frames of some examples."""
    chosen = torch.tensor(rows)
    codes = batch["codes"].index_select(0, to_device(chosen, batch["codes"].device))
    return {"codes": codes, "valid": batch["valid"][chosen]}


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name that are updated, averaged, guarded and counted."""
    return {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
