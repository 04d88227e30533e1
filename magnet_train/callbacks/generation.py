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

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.audio_files import recognisable_name, write_audio, write_picture
from magnet_train.common.errors import UserError
from magnet_train.common.folders import safe_name
from magnet_train.data.pipeline import Batch, ShardSet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import Generated, Generator
from magnet_train.metrics.distributed import gather_by_id, gathered
from magnet_train.metrics.embedders import Listener, load_listener
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.record import Record, write_records
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import NEEDS_REFERENCE, HeardSet, parse_metric, score, together
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
        """Written by the last validation, by all ranks."""
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
        chosen = chosen_items(self._shards(trainer).counts, self.num_prompts)
        assert isinstance(pl_module, MagnetModule)
        size = pl_module.config.codebook_size
        codes = batch["codes"].transpose(0, 1)[:, batch["valid"]]  # k n
        counts = torch.stack([torch.bincount(row, minlength=size).double() for row in codes])
        self._frequencies = counts if self._frequencies is None else self._frequencies + counts
        for i, key in enumerate(batch["keys"]):
            reference = batch["references"][i]
            if reference is not None:
                self._real[key] = reference
            if (index := batch["indices"][i]) in chosen:
                own = {"key": key, "index": chosen[index], "caption": batch["captions"][i]}
                own["codes"] = batch["codes"][i, :, : int(batch["valid"][i].sum())].cpu()
                self._items.append(own)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MagnetModule)
        if self.num_prompts and not trainer.sanity_checking:
            self._generate(trainer, pl_module)
        if trainer.state.fn == "fit":
            self.seconds += time.monotonic() - self._start

    def _generate(self, trainer: L.Trainer, module: MagnetModule) -> None:
        with together():
            codec = load_codec(module.codec_name).to(module.device)
            self._load_listeners(trainer, module)
        listeners = self._shared_listeners()
        # Which rank read a prompt is chance; dealt out anew, each has as many, give or take one.
        items = gathered(self._items)
        items = sorted({item["key"]: item for item in items}.values(), key=lambda item: item["index"])
        captions = {item["key"]: item["caption"] for item in items}
        own = items[trainer.global_rank :: trainer.world_size]
        counts = gathered([] if self._frequencies is None else [self._frequencies.cpu()])
        heard = {name: HeardSet(listener) for name, listener in listeners.items()}
        with together():
            decoded = self._decode(trainer, module, codec, own, heard)
        done = {key for keys in gathered([decoded]) for key in keys}
        captions = {key: caption for key, caption in captions.items() if key in done}
        heard = {name: part.gathered() for name, part in heard.items()}
        real = {what: gather_by_id({k: v[what] for k, v in self._real.items()}) for what in ("embeddings", "tags")}
        with together():
            references = self._references(trainer, heard, real)
        if self.floors and not self._floor_values:
            for name, frequencies in (("codec", None), ("unigram", torch.stack(counts).sum(0))):
                floor = {n: HeardSet(listener) for n, listener in listeners.items()}
                with together():
                    self._hear_codes(codec, own, floor, frequencies)
                floor = {n: part.gathered() for n, part in floor.items()}
                with together():
                    records = self._score(floor, references, captions, {}, {"system": name})
                self._floor_values[name] = {record.metric: record.value for record in records}
        step = self.step(trainer, module)
        about = {"system": f"step {step}", "decoding": asdict(self._settings(module)), "seed": self.seed}
        with together():
            records = self._score(heard, references, captions, self._floor_values, about)
        values = {f"val/{record.metric}": record.value for record in records}
        for record in records:
            if record.interval is not None:
                low, high = record.interval
                values[f"val/{record.metric}_ci95"] = (high - low) / 2
        for name, floors in self._floor_values.items():
            values |= {f"val/{metric}/floor_{name}": value for metric, value in floors.items()}
        # Every rank has computed the same, so that the best checkpoint may be chosen by any of them.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
            module.log_dict(values | {"val/num_clips": float(len(captions))}, sync_dist=False)
        if records and trainer.is_global_zero:
            write_records(self._folder(trainer, module) / "records.json", records)
            self._rank_clips(trainer, module, heard, references)
        self.audio, self.pictures = sorted(gathered(self.audio)), sorted(gathered(self.pictures))
        if self.audio:
            rank_zero_info(f"step {step}: {len(self.audio)} clips and pictures in {self.audio[0].parent}")

    def _decode(
        self, trainer: L.Trainer, module: MagnetModule, codec: Codec, own: list[dict[str, Any]],
        heard: dict[str, HeardSet],
    ) -> list[str]:  # fmt: skip
        """Decodes this rank's items and has them heard; the keys of those that the time sufficed for."""
        generator = Generator(module.unsharded, codec, module.text_encoder, self._settings(module), module.crop_s)
        start, folder = time.monotonic(), self._folder(trainer, module)
        self.audio, self.pictures = [], []
        bar = tqdm(
            range(0, len(own), self.batch_size), desc="decoding", unit="batch", leave=False,
            disable=not trainer.is_global_zero,
        )  # fmt: skip
        for first in bar:
            if self.most_s is not None and time.monotonic() - start > self.most_s:
                warnings.warn(
                    f"validation after {self.most_s} s: {first} of {len(own)} prompts of rank "
                    f"{trainer.global_rank} decoded, the rest left out (generation.most_s)",
                    stacklevel=1,
                )
                return [item["key"] for item in own[:first]]
            items = own[first : first + self.batch_size]
            # Always the full batch shape: another one could round differently and tip a tie.
            padding = self.batch_size - len(items)
            prompts = [item["caption"] for item in items] + [""] * padding
            names = [item["key"] for item in items] + ["padding"] * padding
            result = generator.generate(prompts, self.seed, names)
            for i, item in enumerate(items):
                for part in heard.values():
                    part.add(item["key"], result.wav[i], result.sample_rate)
                if item["index"] < self.num_media:
                    self._keep(trainer, module, folder, item, result, i, codec)
        return [item["key"] for item in own]

    def _rank_clips(
        self,
        trainer: L.Trainer,
        module: MagnetModule,
        heard: dict[str, HeardSet],
        references: dict[str, ReferenceStatistics],
    ) -> None:
        """Notes beside each written clip its own FAD, by which the report finds the best and the worst."""
        name = next((name for name in references if f"fad/{name}" in self.metrics), None)
        if name is None or any(len(windows) < 2 for windows in heard[name].embeddings.values()):
            return
        scores = fad_per_clip(heard[name].embeddings, references[name].moments)
        for note in self._folder(trainer, module).glob("[0-9]*.json"):
            about = json.loads(note.read_text())
            if about.get("item") in scores:
                note.write_text(json.dumps(about | {"score": scores[about["item"]]}, indent=2) + "\n")

    def _settings(self, module: MagnetModule) -> DecodingConfig:
        """How the codes are decoded: spans as in training."""
        return replace(self.decoding, span_len=module.span_len)

    @staticmethod
    def step(trainer: L.Trainer, module: MagnetModule) -> int:
        """Optimizer steps of the weights: outside `fit` those of the checkpoint."""
        return trainer.global_step or module.trained_steps

    def _folder(self, trainer: L.Trainer, module: MagnetModule) -> Path:
        split = "test" if trainer.testing else "validation"
        return Path(trainer.default_root_dir) / split / f"step_{self.step(trainer, module):07d}"

    @staticmethod
    def _shards(trainer: L.Trainer) -> ShardSet:
        """Of the split that is looked at."""
        return trainer.datamodule.shards("test" if trainer.testing else "validation")  # type: ignore[attr-defined]

    def _load_listeners(self, trainer: L.Trainer, module: MagnetModule) -> None:
        """The networks that are to be had, loaded once.

        Raises:
            UserError: outside of training, if one of them is not; within, if the best checkpoint goes by it.
        """
        if self._listeners is not None:
            return
        self._listeners = {}
        for name in dict.fromkeys(parse_metric(metric)[1] for metric in self.metrics):
            try:
                listener = load_listener(name, device=str(module.device))
            except UserError as error:
                if not (self.within_fit or trainer.state.fn == "fit"):
                    raise
                monitors = [getattr(c, "monitor", None) or "" for c in trainer.checkpoint_callbacks]
                if any(m.startswith("val/") and f"/{name}" in m for m in monitors):
                    raise UserError(f"checkpoint.monitor is a metric of {name}, and {error}") from error
                rank_zero_warn(f"no metrics of {name}: {error}")
                continue
            if module.crop_s < listener.shortest_s:
                rank_zero_warn(
                    f"no metrics of {name}: it hears {listener.shortest_s:.2f} s at a time, the clips have "
                    f"{module.crop_s} s"
                )
                continue
            self._listeners[name] = listener

    def _shared_listeners(self) -> dict[str, Listener]:
        """Those that every rank could load, or some would wait for others; a collective."""
        assert self._listeners is not None
        everywhere = set.intersection(*(set(names) for names in gathered([list(self._listeners)])))
        if missing := set(self._listeners) - everywhere:
            rank_zero_warn(f"no metrics of {', '.join(sorted(missing))}: another rank has no weights of them")
        return {name: listener for name, listener in self._listeners.items() if name in everywhere}

    def _references(
        self, trainer: L.Trainer, heard: dict[str, HeardSet], real: dict[str, dict[str, Tensor]]
    ) -> dict[str, ReferenceStatistics]:
        """What each listener heard in the real clips: of the shards (`real`), or of the files in `reference`."""
        found: dict[str, ReferenceStatistics] = {}
        for name, part in heard.items():
            listener = part.listener
            if name == "musicnn" and real["embeddings"]:
                files = [str(shard.get("sha256")) for shard in self._shards(trainer).index["shards"]]
                own = HeardSet(listener, real["embeddings"], real["tags"])
                found[name] = own.statistics(names=[*real["embeddings"], *files])
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

    @staticmethod
    def _hear_codes(
        codec: Codec, own: list[dict[str, Any]], heard: dict[str, HeardSet], frequencies: Tensor | None
    ) -> None:
        """The codec's reconstructions of the items' real codes, or of codes drawn by `frequencies` (`k c`)."""
        for item in own:
            codes = item["codes"]
            if frequencies is not None:
                generator = torch.Generator().manual_seed(item["index"])
                draws = [torch.multinomial(f.cpu(), codes.shape[1], True, generator=generator) for f in frequencies]
                codes = torch.stack(draws)
            wav = codec.decode(codes[None].to(codec.device))[0]
            for part in heard.values():
                part.add(item["key"], wav, codec.facts.sample_rate)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _keep(
        self, trainer: L.Trainer, module: MagnetModule, folder: Path, item: dict[str, Any], result: Generated, i: int,
        codec: Codec,
    ) -> None:  # fmt: skip
        path = folder / f"{item['index']:02d}_{recognisable_name(item['caption'])}.wav"
        about = {"prompt": item["caption"], "item": item["key"], "seed": self.seed}
        about |= {"step": self.step(trainer, module), "decoding": asdict(self._settings(module))}
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


def chosen_items(counts: list[int], num_prompts: int) -> dict[int, int]:
    """Places in the split of the items that are generated for, spread over it, and the number that each gets.

    >>> chosen_items([5, 5], 4)
    {0: 0, 2: 1, 4: 2, 6: 3}
    """
    total = sum(counts)
    number = min(total, num_prompts)
    step = total / number if number and total < 2 * number else total // max(number, 1)
    return {int(i * step): i for i in range(number)}


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
            write_audio(folder / f"{safe_name(key)}.wav", outputs["wav"][i].T.cpu().numpy(), outputs["sample_rate"], about)
