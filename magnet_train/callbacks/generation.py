"""Validation as a listener would do it: decode captions in full, score the audio, keep it to be heard and seen."""

import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
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
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.items import gather_by_id
from magnet_train.metrics.listeners import Listener, load_listener
from magnet_train.metrics.record import Record, write_records
from magnet_train.metrics.reference_statistics import ReferenceStatistics
from magnet_train.metrics.scoring import NEEDS_REFERENCE, HeardSet, parse_metric, raise_together, score
from magnet_train.module import MagnetModule


class GenerationCallback(Callback):
    """Decodes captions of the validation split in full and scores, writes and logs what comes out.

    Each rank decodes the items it owns, without any collective, and always at the full batch shape; then what was
    heard is gathered by item, and the first rank scores all of it. Runs on the averaged weights, because it stands
    before the averaging callback.
    """

    def __init__(
        self,
        num_prompts: int = 32,
        batch_size: int = 4,
        decoding: DecodingConfig = DecodingConfig(),  # noqa: B008  frozen, and jsonargparse reads the type
        num_media: int = 8,
        at_start: bool = True,
        floors: bool = True,
        metrics: tuple[str, ...] = ("fad/musicnn", "kl/musicnn", "text/musicnn"),
        reference: str | None = None,
        most_s: float | None = None,
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
            metrics: what is scored, KIND/LISTENER each, as of `evaluate`; those whose weights are not to be had are
                left out of `fit`, with a warning.
            reference: folder of statistics that `evaluate --save_reference` wrote of the validation clips' audio, for
                listeners other than musicnn; for KL the files must be named as the items.
            most_s: seconds after which a rank begins no further batch, for a bounded validation; then fewer clips are
                scored, and a warning says how many. None = no bound.
            seed: of the decoding noise; each item's depends on it and the item's id alone.
        """
        if num_prompts < 0 or batch_size < 1 or num_media < 0:
            raise UserError(
                f"generation: num_prompts={num_prompts} and num_media={num_media} must be at least 0, "
                f"batch_size={batch_size} at least 1"
            )
        self.num_prompts, self.batch_size, self.num_media = num_prompts, batch_size, num_media
        self.decoding, self.at_start, self.floors, self.seed = decoding, at_start, floors, seed
        for metric in metrics:
            parse_metric(metric)
        if most_s is not None and most_s <= 0:
            raise UserError(f"generation: most_s={most_s}: give seconds above 0, or none")
        self.metrics, self.reference, self.most_s = tuple(metrics), reference, most_s
        self.within_fit = False
        """Whether the validation belongs to a training run, that of the untrained model included."""
        self.audio: list[Path] = []
        self.pictures: list[Path] = []
        self.seconds = 0.0
        self._floor_values: dict[str, dict[str, float]] = {}
        self._start = 0.0
        self._listeners: dict[str, Listener] | None = None
        self._items: list[dict[str, Any]] = []
        self._real: dict[str, dict[str, Tensor]] = {}
        self._frequencies: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """So that a checkpoint plays as its validations did; a resumed run goes by its configuration all the same."""
        return {"decoding": asdict(self.decoding)}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._items, self._real, self._frequencies = [], {}, None

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
                self._real[key] = reference
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
        failure: str | None = None
        heard: dict[str, HeardSet] = {}
        try:
            codec = load_codec(module.codec_name).to(module.device)
            listeners = self._listening(trainer, module)
            heard = {name: HeardSet(listener) for name, listener in listeners.items()}
            self._decode(trainer, module, codec, heard)
        except Exception as error:  # whatever it is, no other rank may wait for this one
            if trainer.world_size == 1:
                raise
            failure = f"{type(error).__name__}: {error}"
        raise_together(failure)
        heard = {name: part.gathered() for name, part in heard.items()}
        references = self._references(trainer, heard)
        captions = gather_by_id({item["key"]: _bytes(item["caption"]) for item in self._items})
        texts = {key: bytes(value.tolist()).decode() for key, value in captions.items()}
        if self.floors and not self._floor_values:
            self._floor_values = self._floors(trainer, module, codec, listeners, references, texts)
        records: list[Record] = []
        if trainer.is_global_zero:
            about = {"system": f"step {trainer.global_step}", "decoding": asdict(self.decoding), "seed": self.seed}
            records = self._score(heard, references, texts, self._floor_values, about)
        values = {f"val/{record.metric}": record.value for record in records}
        for record in records:
            if record.interval is not None:
                low, high = record.interval
                values[f"val/{record.metric}_ci95"] = (high - low) / 2
        for name, floors in self._floor_values.items():
            values |= {f"val/{metric}/floor_{name}": value for metric, value in floors.items()}
        # Every rank logs the same, so that the best checkpoint may be chosen by any of them.
        values = trainer.strategy.broadcast(values | {"val/num_clips": float(len(texts))})
        module.log_dict(values, sync_dist=False)
        if records:
            write_records(self._folder(trainer) / "records.json", records)
            self._rank_clips(trainer, heard, references)
        self._log_media(trainer, trainer.global_step)

    def _decode(self, trainer: L.Trainer, module: MagnetModule, codec: Codec, heard: dict[str, HeardSet]) -> None:
        """Decodes this rank's items and has them heard."""
        decoding = replace(self.decoding, span_len=module.span_len)
        generator = Generator(module.network, codec, module.text_encoder, decoding, module.crop_s)
        start, folder = time.monotonic(), self._folder(trainer)
        self.audio, self.pictures = [], []
        bar = tqdm(
            range(0, len(self._items), self.batch_size), desc="decoding", unit="batch", leave=False,
            disable=not trainer.is_global_zero,
        )  # fmt: skip
        for first in bar:
            if self.most_s is not None and time.monotonic() - start > self.most_s:
                warnings.warn(
                    f"validation after {self.most_s} s: {first} of {len(self._items)} prompts of rank "
                    f"{trainer.global_rank} decoded, the rest left out (generation.most_s)",
                    stacklevel=1,
                )
                self._items = self._items[:first]
                return
            items = self._items[first : first + self.batch_size]
            # Always the full batch shape: another one could round differently and tip a tie.
            padding = self.batch_size - len(items)
            prompts = [item["caption"] for item in items] + [""] * padding
            names = [item["key"] for item in items] + ["padding"] * padding
            result = generator.generate(prompts, self.seed, names)
            for i, item in enumerate(items):
                for part in heard.values():
                    part.add(item["key"], result.wav[i], result.sample_rate)
                if item["index"] < self.num_media:
                    self._keep(trainer, folder, item, result, i, codec)

    def _rank_clips(
        self, trainer: L.Trainer, heard: dict[str, HeardSet], references: dict[str, ReferenceStatistics]
    ) -> None:
        """Notes beside each written clip its own FAD, by which the report finds the best and the worst."""
        name = next((name for name in references if f"fad/{name}" in self.metrics), None)
        if name is None or any(len(windows) < 2 for windows in heard[name].embeddings.values()):
            return
        scores = fad_per_clip(heard[name].embeddings, references[name].moments)
        for note in self._folder(trainer).glob("[0-9]*.json"):
            about = json.loads(note.read_text())
            if about.get("item") in scores:
                note.write_text(json.dumps(about | {"score": scores[about["item"]]}, indent=2) + "\n")

    @staticmethod
    def _folder(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "validation" / f"step_{trainer.global_step:07d}"

    def _listening(self, trainer: L.Trainer, module: MagnetModule) -> dict[str, Listener]:
        """The networks that are to be had, loaded once.

        Raises:
            UserError: outside `fit`, if one of them is not.
        """
        if self._listeners is None:
            self._listeners = {}
            for name in dict.fromkeys(parse_metric(metric)[1] for metric in self.metrics):
                try:
                    listener = load_listener(name, device=str(module.device))
                except UserError as error:
                    if not self.within_fit:
                        raise
                    rank_zero_warn(f"no metrics of {name}: {error}")
                    continue
                if module.crop_s < listener.shortest_s:
                    rank_zero_warn(
                        f"no metrics of {name}: it hears {listener.shortest_s:.2f} s at a time, the clips have "
                        f"{module.crop_s} s"
                    )
                    continue
                self._listeners[name] = listener
        return self._listeners

    def _references(self, trainer: L.Trainer, heard: dict[str, HeardSet]) -> dict[str, ReferenceStatistics]:
        """What each listener heard in the real clips: of the shards, or of the files in `reference`. A collective."""
        found: dict[str, ReferenceStatistics] = {}
        real = {
            what: gather_by_id({key: value[what] for key, value in self._real.items()})
            for what in ("embeddings", "tags")
        }
        for name, part in heard.items():
            listener = part.listener
            if name == "musicnn" and real["embeddings"]:
                index = trainer.datamodule.shards("validation").index  # type: ignore[attr-defined]
                own = HeardSet(listener, real["embeddings"], real["tags"], rates={index["codec"]["sample_rate"]})
                found[name] = own.statistics()
            elif self.reference is not None:
                found[name] = ReferenceStatistics.load(
                    Path(self.reference) / f"{name}.safetensors", embedder=listener.id, embedder_hash=listener.hash,
                    windowing=listener.windowing,
                )  # fmt: skip
        return found

    def _score(
        self, heard: dict[str, HeardSet], references: dict[str, ReferenceStatistics], captions: dict[str, str],
        floors: dict[str, dict[str, float]], about: dict[str, Any],
    ) -> list[Record]:  # fmt: skip
        """A record for every metric that can be computed; a warning for each that cannot."""
        records = []
        for metric in self.metrics:
            kind, name = parse_metric(metric)
            if name not in heard:
                continue
            reference = references.get(name)
            if kind in NEEDS_REFERENCE and reference is None:
                remedy = "tokenize with --embedder musicnn" if name == "musicnn" else "give --generation.reference"
                rank_zero_warn(f"no {metric}: the validation shards hold no references; {remedy}")
                continue
            try:
                floor = floors.get("codec", {}).get(metric)
                records.append(score(metric, heard[name], reference, captions, floor_codec=floor, **about))
            except UserError as error:  # too few clips for this metric: no reason to end the run
                rank_zero_warn(f"no {metric}: {error}")
        return records

    def _floors(
        self, trainer: L.Trainer, module: MagnetModule, codec: Codec, listeners: dict[str, Listener],
        references: dict[str, ReferenceStatistics], captions: dict[str, str],
    ) -> dict[str, dict[str, float]]:  # fmt: skip
        """The same scores for the codec's reconstruction of real codes, and for codes drawn without a model."""
        frequencies = self._frequencies if self._frequencies is not None else torch.ones(1, 1)
        values: dict[str, dict[str, float]] = {}
        for name in ("codec", "unigram"):
            heard = {listener.name: HeardSet(listener) for listener in listeners.values()}
            for item in self._items:
                codes = item["codes"]
                if name == "unigram":
                    generator = torch.Generator().manual_seed(item["index"])
                    draws = [torch.multinomial(f.cpu(), codes.shape[1], True, generator=generator) for f in frequencies]
                    codes = torch.stack(draws)
                wav = codec.decode(codes[None].to(module.device))[0]
                for part in heard.values():
                    part.add(item["key"], wav, codec.facts.sample_rate)
            heard = {n: part.gathered() for n, part in heard.items()}
            if trainer.is_global_zero:
                records = self._score(heard, references, captions, {}, {"system": name})
                values[name] = {record.metric: record.value for record in records}
        return trainer.strategy.broadcast(values)

    def _keep(
        self, trainer: L.Trainer, folder: Path, item: dict[str, Any], result: Generated, i: int, codec: Codec
    ) -> None:
        path = folder / f"{item['index']:02d}_{recognisable_name(item['caption'])}.wav"
        about = {"prompt": item["caption"], "item": item["key"], "seed": self.seed, "step": trainer.global_step}
        about["decoding"] = vars(self.decoding)
        write_audio(path, result.wav[i].T.cpu().numpy(), result.sample_rate, about)
        real = codec.decode(item["codes"][None].to(codec.device))[0].mean(0).cpu().numpy()
        made = result.wav[i].mean(0).cpu().numpy()
        # For the report: what was decoded, and when each code became final.
        codes = {"codes": result.codes[i].cpu().numpy().astype(np.uint16), "order": result.order[i].cpu().numpy()}
        np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **codes)
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


def _bytes(text: str) -> Tensor:
    """A text as a tensor, so that it may be gathered."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


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
