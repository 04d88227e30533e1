"""Validation as a listener would do it: decode captions in full, score the audio, keep it to be heard and seen."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from magnet_train.audio_files import recognisable_name, write_audio, write_picture
from magnet_train.codec import Codec, load_codec
from magnet_train.data.pipeline import Batch
from magnet_train.decoding import DecodingConfig
from magnet_train.errors import UserError
from magnet_train.generator import Generated, Generator
from magnet_train.metrics.embedders import load_musicnn
from magnet_train.metrics.fad import FrechetAudioDistance
from magnet_train.metrics.kl import TagKL
from magnet_train.metrics.text_audio import TextAudioScore, load_text_audio
from magnet_train.module import MagnetModule


class Scores:
    """FAD, tag KL and text-audio score of one set of clips; what cannot be computed is left out, with a warning.

    Audio is scored as the codec gave it, at the level it learnt from the originals: the same clips brought to
    -14 LUFS lie 5 FAD away from themselves.
    """

    def __init__(self, musicnn: Any, head: Any, has_references: bool):
        self.musicnn, self.head = musicnn, head
        self.fad = FrechetAudioDistance(dim=musicnn.dim) if has_references else None
        self.kl = TagKL() if has_references else None
        self.text = TextAudioScore() if head is not None else None

    def add_reference(self, embeddings: Tensor) -> None:
        """Windows of real audio, `n d`."""
        if self.fad is not None:
            self.fad.update_reference(embeddings.cpu())

    def add(self, key: str, wav: Tensor, sample_rate: int, caption: str, tags: Tensor | None) -> None:
        """One clip `channels t`; `tags` are those of its original."""
        heard = self.musicnn(self.musicnn.resample(wav.mean(0).cpu(), sample_rate))
        if self.fad is not None:
            self.fad.update(heard.embeddings, key=key)
        if self.kl is not None and tags is not None:
            self.kl.update(tags.cpu(), heard.tags, key=key)
        if self.text is not None:
            self.text.update(self.head.score([caption], [heard]), keys=[key])

    def compute(self) -> dict[str, float]:
        """Metric name to value. A collective: every rank calls it."""
        metrics = {"fad/musicnn": self.fad, "kl/musicnn_tags": self.kl, "text_audio": self.text}
        values = {}
        for name, metric in metrics.items():
            try:
                if metric is not None:
                    values[name] = float(metric.compute())
            except UserError as error:  # too few clips for this metric: no reason to end the run
                rank_zero_warn(f"no {name}: {error}")
        return values


class GenerationCallback(Callback):
    """Decodes captions of the validation split in full and scores, writes and logs what comes out.

    Each rank decodes the items it owns, without any collective, and always at the full batch shape; one
    reduction follows. Runs on the averaged weights, because it stands before the averaging callback.
    """

    def __init__(
        self,
        num_prompts: int = 32,
        batch_size: int = 4,
        decoding: DecodingConfig = DecodingConfig(),  # noqa: B008  frozen, and jsonargparse reads the type
        num_media: int = 8,
        at_start: bool = True,
        floors: bool = True,
        seed: int = 0,
    ):
        """What a validation generates.

        Args:
            num_prompts: captions that are decoded, spread over the validation split; 0 = none.
            batch_size: clips decoded together on each rank.
            decoding: how; span_len is the model's. The published defaults if not given.
            num_media: clips that are written and logged as audio and pictures.
            at_start: whether the untrained model is validated too, for comparison.
            floors: whether codec reconstructions, and codes drawn from each codebook's own frequencies, are scored
                once beside the model.
            seed: of the decoding noise; each item's depends on it and the item's id alone.
        """
        if num_prompts < 0 or batch_size < 1 or num_media < 0:
            raise UserError(
                f"generation: num_prompts={num_prompts} and num_media={num_media} must be at least 0, "
                f"batch_size={batch_size} at least 1"
            )
        self.num_prompts, self.batch_size, self.num_media = num_prompts, batch_size, num_media
        self.decoding, self.at_start, self.floors, self.seed = decoding, at_start, floors, seed
        self.audio: list[Path] = []
        self.pictures: list[Path] = []
        self.seconds = 0.0
        self._floor_values: dict[str, float] = {}
        self._start = 0.0
        self._parts: tuple[Codec, Any, Any] | None = None
        self._items: list[dict[str, Any]] = []
        self._references: list[Tensor] = []
        self._frequencies: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """So that a checkpoint plays as its validations did; a resumed run goes by its configuration all the same."""
        return {"decoding": asdict(self.decoding)}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._items, self._references, self._frequencies = [], [], None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep this rank's references, code frequencies and chosen captions as they pass by."""
        if not self.num_prompts:
            return
        total = trainer.datamodule.num_items("validation")  # type: ignore[attr-defined]
        every = max(1, total // self.num_prompts)
        assert isinstance(pl_module, MagnetModule)
        size = pl_module.config.codebook_size
        codes = batch["codes"].transpose(0, 1)[:, batch["valid"]]  # k n
        counts = torch.stack([torch.bincount(row, minlength=size).double() for row in codes])
        self._frequencies = counts if self._frequencies is None else self._frequencies + counts
        for i, key in enumerate(batch["keys"]):
            reference = batch["references"][i]
            if reference is not None:
                self._references.append(reference["embeddings"])
            index = batch["indices"][i]
            if index % every == 0 and index // every < self.num_prompts:
                own = {"key": key, "index": index // every, "caption": batch["captions"][i], "reference": reference}
                own["codes"] = batch["codes"][i, :, : int(batch["valid"][i].sum())].cpu()
                self._items.append(own)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MagnetModule)
        if self.num_prompts and not trainer.sanity_checking:
            self._generate(trainer, pl_module)
        if trainer.state.fn == "fit":
            self.seconds += time.monotonic() - self._start

    def _generate(self, trainer: L.Trainer, module: MagnetModule) -> None:
        if self._parts is None:
            self._parts = self._load(module)
        codec, musicnn, head = self._parts
        codec.to(module.device)
        decoding = replace(self.decoding, span_len=module.span_len)
        generator = Generator(module.network, codec, module.text_encoder, decoding, module.crop_s)
        scores = self._new_scores(trainer, musicnn, head)
        is_audible = module.crop_s >= musicnn.shortest_s
        if not is_audible:
            rank_zero_warn(f"no metrics of the audio: musicnn hears 3 s at a time, the clips have {module.crop_s} s")
        step = trainer.global_step
        folder = Path(trainer.default_root_dir) / "validation" / f"step_{step:07d}"
        self.audio, self.pictures = [], []
        bar = tqdm(
            range(0, len(self._items), self.batch_size), desc="decoding", unit="batch", leave=False,
            disable=not trainer.is_global_zero,
        )  # fmt: skip
        for first in bar:
            items = self._items[first : first + self.batch_size]
            # Always the full batch shape: another one could round differently and tip a tie.
            padding = self.batch_size - len(items)
            prompts = [item["caption"] for item in items] + [""] * padding
            names = [item["key"] for item in items] + ["padding"] * padding
            result = generator.generate(prompts, self.seed, names)
            for i, item in enumerate(items):
                reference = item["reference"]
                tags = None if reference is None else reference["tags"].mean(0)
                if is_audible:
                    scores.add(item["key"], result.wav[i], result.sample_rate, item["caption"], tags)
                if item["index"] < self.num_media:
                    self._keep(trainer, folder, item, result, i, codec)
        values = {f"val/{name}": value for name, value in scores.compute().items()} if is_audible else {}
        if self.floors and is_audible and not self._floor_values:
            self._floor_values = self._floors(trainer, codec, musicnn, head, module)
        values |= self._floor_values
        values["val/num_clips"] = float(self._count(trainer, len(self._items)))
        module.log_dict(values, rank_zero_only=True, sync_dist=False)
        self._log_media(trainer, step)

    def _load(self, module: MagnetModule) -> tuple[Codec, Any, Any]:
        head = None
        try:
            head = load_text_audio()
        except UserError as error:
            rank_zero_warn(f"no text-audio score: {error}")
        return load_codec(module.codec_name), load_musicnn(), head

    @staticmethod
    def _count(trainer: L.Trainer, own: int) -> int:
        total = trainer.strategy.reduce(torch.tensor(float(own), device=trainer.strategy.root_device), reduce_op="sum")
        return int(total)

    def _new_scores(self, trainer: L.Trainer, musicnn: Any, head: Any) -> Scores:
        """With the references of this rank already in it."""
        index = trainer.datamodule.shards("validation").index  # type: ignore[attr-defined]
        has_references = index["embedder"] != "none"
        if not has_references:
            rank_zero_warn("no FAD and KL: the validation shards hold no references; tokenize with --embedder musicnn")
        scores = Scores(musicnn, head, has_references)
        for embeddings in self._references:
            scores.add_reference(embeddings)
        return scores

    def _floors(
        self, trainer: L.Trainer, codec: Codec, musicnn: Any, head: Any, module: MagnetModule
    ) -> dict[str, float]:
        """The same scores for the codec's reconstruction of real codes, and for codes drawn without a model."""
        frequencies = self._frequencies if self._frequencies is not None else torch.ones(1, 1)
        values = {}
        for name in ("codec", "unigram"):
            scores = self._new_scores(trainer, musicnn, head)
            for item in self._items:
                codes = item["codes"]
                if name == "unigram":
                    generator = torch.Generator().manual_seed(item["index"])
                    draws = [torch.multinomial(f.cpu(), codes.shape[1], True, generator=generator) for f in frequencies]
                    codes = torch.stack(draws)
                tags = None if item["reference"] is None else item["reference"]["tags"].mean(0)
                wav = codec.decode(codes[None].to(module.device))[0]
                scores.add(item["key"], wav, codec.facts.sample_rate, item["caption"], tags)
            values |= {f"val/{metric}/floor_{name}": value for metric, value in scores.compute().items()}
        return values

    def _keep(
        self, trainer: L.Trainer, folder: Path, item: dict[str, Any], result: Generated, i: int, codec: Codec
    ) -> None:
        path = folder / f"{item['index']:02d}_{recognisable_name(item['caption'])}.wav"
        about = {"prompt": item["caption"], "item": item["key"], "seed": self.seed, "step": trainer.global_step}
        about["decoding"] = vars(self.decoding)
        write_audio(path, result.wav[i].T.cpu().numpy(), result.sample_rate, about)
        real = codec.decode(item["codes"][None].to(codec.device))[0].mean(0).cpu().numpy()
        made = result.wav[i].mean(0).cpu().numpy()
        picture = path.with_suffix(".png")
        titles = {f"generated: {item['caption']}": made, "codec reconstruction of the real clip": real}
        write_picture(picture, titles, result.sample_rate, result.order[i].cpu().numpy())
        self.audio.append(path)
        self.pictures.append(picture)

    def _log_media(self, trainer: L.Trainer, step: int) -> None:
        """Audio and pictures of this rank to W&B, where that is the logger."""
        from lightning.pytorch.loggers import WandbLogger

        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and self.audio:
                import wandb

                captions = [path.stem for path in self.audio]
                media: dict[str, Any] = {
                    "gen/audio": [wandb.Audio(str(p), caption=c) for p, c in zip(self.audio, captions, strict=True)],
                    "gen/pictures": [
                        wandb.Image(str(p), caption=c) for p, c in zip(self.pictures, captions, strict=True)
                    ],
                }
                logger.experiment.log(media | {"trainer/global_step": step})
        if self.audio:
            rank_zero_info(f"step {step}: {len(self.audio)} clips and pictures in {self.audio[0].parent}")


class PredictionWriter(Callback):
    """Writes what `predict` generates into the run folder's `predictions`."""

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = Path(trainer.default_root_dir) / "predictions"
        for i, (key, caption) in enumerate(zip(batch["keys"], batch["captions"], strict=True)):
            about = {"prompt": caption, "item": key, "step": trainer.global_step}
            write_audio(folder / f"{key}.wav", outputs["wav"][i].T.cpu().numpy(), outputs["sample_rate"], about)
