"""Validation by generation: decode captions in full, score the audio, write it with plots."""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from magnet_train.codec.base import Codec, load_codec, load_codec_facts
from magnet_train.common.audio_files import save_plot, slug, write_audio
from magnet_train.common.errors import UserError
from magnet_train.common.folders import safe_name, write_json
from magnet_train.common.ranges import check_values
from magnet_train.data.pipeline import Batch
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.autoregressive import check_decoding
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.load_rescorer import check_rescorer
from magnet_train.evaluation import scorer
from magnet_train.generator import DecodedItem, Generator
from magnet_train.metrics.baselines import CountTables
from magnet_train.metrics.distributed import (
    all_gather_by_id,
    all_gather_list,
    raise_on_all_ranks,
)
from magnet_train.metrics.embedders import Embedder, load_embedder
from magnet_train.metrics.record import Record, write_records
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import (
    REFERENCE_METRICS,
    FeatureSet,
    load_reference,
    parse_metric,
)
from magnet_train.module import MagnetModule

MODEL = "model"
"""System name of the generated clips; the baselines have their own."""
BASELINES = {
    "codec": "the codec's reconstructions of the real clips",
    "unigram": "codes drawn by their frequencies",
    "bigram": "codes drawn by how often they follow the code before",
}


@dataclass(frozen=True)
class ChosenItem:
    """An item of the validation split that is decoded."""

    number: int
    """Place among the chosen items, from 0."""
    caption: str
    codes: Tensor
    """Real codes, `k t`."""


class GenerationCallback(Callback):
    """Validation by generation from captions.

    Each rank decodes its share of the items in full batches, without any collective. Features are
    then gathered by item, and every rank computes the same metrics. This callback must come before
    the averaging callback, so that it uses the averaged weights.
    """

    def __init__(  # noqa: PLR0913  each is an option of the command line
        self,
        num_prompts: int = 32,
        batch_size: int = 4,
        decoding: DecodingConfig = DecodingConfig(),
        num_media: int = 8,
        at_start: bool = True,
        baselines: bool = True,
        metrics: tuple[str, ...] = ("fad/musicnn", "kl/musicnn", "text/musicnn"),
        reference: str | None = None,
        max_seconds: float | None = None,
        seed: int = 0,
    ):
        """
        Args:
            num_prompts: Captions to decode, spread over the validation split; 0 = none.
            batch_size: Clips per batch on each rank.
            decoding: Decoding settings; span_len is always the model's.
            num_media: Clips that are written and logged as audio and plots.
            at_start: Also validate the untrained model, for comparison.
            baselines: Also score codec reconstructions, and codes drawn by unigram and bigram
                counts of the training shards, once.
            metrics: Metrics as METRIC/EMBEDDER, as in `evaluate`. `fit` skips those whose weights
                are missing, with a warning.
            reference: Folder written by `evaluate --save_reference` for the validation clips, for
                embedders other than musicnn. For KL its files must have the names of the items.
            max_seconds: Time limit for generation in each validation, in seconds per rank;
                unfinished prompts are skipped, with a warning. None = no limit.
            seed: Seed of the decoding noise; the noise of an item is a function of seed and id.
        """
        for metric in metrics:
            parse_metric(metric)
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.decoding = decoding
        self.num_media = num_media
        self.at_start = at_start
        self.baselines = baselines
        self.metrics = tuple(metrics)
        self.reference = None if reference is None else str(Path(reference).expanduser())
        self.max_seconds = max_seconds
        self.seed = seed
        check_values(
            self,
            "generation: ",
            num_prompts="[0, inf)",
            batch_size="[1, 100000]",
            num_media="[0, inf)",
            max_seconds="(0, inf)",
        )
        self.within_fit = False
        """Whether the validation is part of `fit`, including that of the untrained model."""
        self.audio: list[Path] = []
        """Files written by the last validation, on all ranks."""
        self.plots: list[Path] = []
        self.seconds = 0.0
        self._baseline_values: dict[str, dict[str, float]] = {}
        """Baseline to metric to value, from the first validation."""
        self._codec_music: ReferenceStatistics | None = None
        """Music statistics of the codec's reconstructions: the reference of the music metrics,
        because shards contain no audio."""
        self._start = 0.0
        self._embedders: dict[str, Embedder] | None = None
        self._items: dict[str, ChosenItem] = {}
        """Items to decode that this rank read, by key."""
        self._real: dict[str, dict[str, Tensor]] = {}
        """References from the shards, by key."""
        self._counts: Tensor | None = None
        """Code counts, `k c`."""

    def state_dict(self) -> dict[str, Any]:
        """The decoding settings, as defaults for `generate`; a resumed run uses its own."""
        return {"decoding": asdict(self.decoding)}

    # --- Collect ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, MagnetModule)
        self.check(pl_module)

    def check(self, module: MagnetModule, monitor: str | None = None) -> None:
        """Check that a model can be decoded with these settings, and that references are there.

        Args:
            module: the model.
            monitor: checkpoint.monitor, whose network has to be there too.

        Raises:
            UserError: if not.
        """
        check_decoding(module.config, self.decoding, module.crop_s)
        if not self.num_prompts:
            return
        if self.decoding.rescorer is not None:
            check_rescorer(self.decoding.rescorer, load_codec_facts(module.codec_name).to_dict())
        for name in embedders_with_reference(self.metrics):
            self._check_reference(name)
        for metric in self.metrics:
            if monitor == f"val/{metric}":
                name = parse_metric(metric)[1]
                try:
                    load_embedder(name)
                except UserError as error:
                    raise _monitors_missing(name, error) from error

    def _check_reference(self, name: str) -> None:
        """Check that `reference` has an embedder's statistics, unless they come from elsewhere."""
        if self.reference is None or name in ("musicnn", "music"):  # from shards, or computed
            return
        file = Path(self.reference) / f"{name}.safetensors"
        if not file.is_file():
            raise UserError(
                f"generation.reference: {file}: no such file; write it with evaluate "
                f"--save_reference, or remove the metrics of {name}"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._items = {}
        self._real = {}
        self._counts = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps references, code frequencies and the chosen items of this rank."""
        if not self.num_prompts:
            return
        assert isinstance(pl_module, MagnetModule)
        chosen = chosen_items(self._shards(trainer).counts, self.num_prompts)
        codes = batch["codes"].transpose(0, 1)[:, batch["valid"]]  # k n
        size = pl_module.config.codebook_size
        counts = torch.stack([torch.bincount(row, minlength=size).double() for row in codes])
        self._counts = counts if self._counts is None else self._counts + counts
        for i, key in enumerate(batch["keys"]):
            reference = batch["references"][i]
            if reference is not None:
                self._real[key] = reference
            index = batch["indices"][i]
            if index in chosen:
                num_frames = int(batch["valid"][i].sum())
                codes = batch["codes"][i, :, :num_frames].cpu()
                self._items[key] = ChosenItem(chosen[index], batch["captions"][i], codes)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MagnetModule)
        if self.num_prompts and not trainer.sanity_checking:
            self._validate(trainer, pl_module)
        if trainer.state.fn == "fit":
            self.seconds += time.monotonic() - self._start

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # --- Decode, embed, score ---------------------------------------------------------------------

    def _validate(self, trainer: L.Trainer, module: MagnetModule) -> None:
        items = self._all_items()
        captions = {key: item.caption for key, item in items.items()}
        share = dict(list(items.items())[trainer.global_rank :: trainer.world_size])
        counts = all_gather_list([] if self._counts is None else [self._counts.cpu()])
        embeds_baselines = self.baselines and not self._baseline_values
        tables = self._count_tables(trainer) if embeds_baselines else None
        features: dict[str, scorer.Features] = {}
        decoded: list[str] = []
        with raise_on_all_ranks():
            codec = load_codec(module.codec_name).to(module.device)
            embedders = self._load_embedders(trainer, module)
            features[MODEL], decoded = self._decode(trainer, module, codec, share, embedders)
            if embeds_baselines:
                features |= self._embed_baselines(codec, share, sum(counts), tables, embedders)
        done = set(all_gather_list(decoded))
        features = self._gather(features)
        self._keep_codec_music(features)
        real = {name: self._gather_real(name) for name in ("embeddings", "tags")}
        self.audio = sorted(all_gather_list(self.audio))
        self.plots = sorted(all_gather_list(self.plots))
        records: list[Record] = []
        with raise_on_all_ranks():
            references = self._load_references(trainer, features[MODEL], real)
            self._score_baselines(features, references, captions)
            records = self._score(
                features[MODEL], references, captions, self._about(trainer, module)
            )
            if records and trainer.is_global_zero:
                write_records(self._folder(trainer, module) / "records.json", records)
                self._note_clip_scores(features[MODEL], references)
        self._log(module, records, len(done))
        if self.audio:
            rank_zero_info(
                f"step {self.step(trainer, module)}: {len(self.audio)} clips and plots in "
                f"{self.audio[0].parent}"
            )

    def _keep_codec_music(self, features: Mapping[str, scorer.Features]) -> None:
        """Keep the statistics of the reconstructions, which are embedded only once."""
        music = features.get("codec", {}).get("music")
        if music is not None and len(music.embeddings) > 1:
            self._codec_music = music.statistics()

    def _gather_real(self, name: str) -> dict[str, Any]:
        """One array of each real clip, by key. Collective."""
        return all_gather_by_id({key: arrays[name] for key, arrays in self._real.items()})

    def _all_items(self) -> dict[str, ChosenItem]:
        """Items of all ranks by key, in order. They are redistributed, because ranks may have read
        very different numbers of them. Collective."""
        items = all_gather_list(list(self._items.items()))
        return dict(sorted(items, key=lambda item: item[1].number))

    def _decode(
        self,
        trainer: L.Trainer,
        module: MagnetModule,
        codec: Codec,
        share: Mapping[str, ChosenItem],
        embedders: Mapping[str, Embedder],
    ) -> tuple[scorer.Features, list[str]]:
        """Decode and embed this rank's items; returns features and the keys of decoded items."""
        settings = self._settings(module)
        generator = Generator(module.unsharded, codec, module.text_encoder, settings, module.crop_s)
        captions = {key: item.caption for key, item in share.items()}
        decoded: list[str] = []
        self.audio = []
        self.plots = []

        def clips() -> Any:
            for item in generator.decode_items(
                captions, self.batch_size, self.seed, max_seconds=self.max_seconds
            ):
                decoded.append(item.key)
                if share[item.key].number < self.num_media:
                    self._write(trainer, module, item, share[item.key], codec)
                yield item

        prepared = scorer.prepare_generated(scorer.decoded_clips(clips()))
        quiet = not trainer.is_global_zero
        features = scorer.embed_clips(
            prepared, embedders.values(), "decoding", len(share), quiet, self.batch_size
        )
        if len(decoded) < len(share):
            warnings.warn(
                f"validation after {self.max_seconds} s: {len(decoded)} of {len(share)} prompts "
                f"of rank {trainer.global_rank} decoded, the rest skipped (generation.max_seconds)",
                stacklevel=1,
            )
        return features, decoded

    @staticmethod
    def _count_tables(trainer: L.Trainer) -> CountTables | None:
        """Counts of the training codes, None where a rank has none. Collective."""
        tables = None
        try:
            tables = trainer.datamodule.count_tables()  # type: ignore[attr-defined]
        except UserError as error:
            rank_zero_warn(f"no bigram baseline: {error}")
        return tables if all(all_gather_list([tables is not None])) else None

    def _embed_baselines(
        self,
        codec: Codec,
        share: Mapping[str, ChosenItem],
        counts: Any,
        tables: CountTables | None,
        embedders: Mapping[str, Embedder],
    ) -> dict[str, scorer.Features]:
        """Features of codec reconstructions, and of codes drawn by their counts `k c` and by count
        tables."""
        real = {key: item.codes for key, item in share.items()}
        seeds = {key: item.number for key, item in share.items()}
        systems = {"codec": real} | scorer.drawn_codes(real, seeds, counts, tables)
        features = {}
        for name, codes in systems.items():
            clips = scorer.prepare_generated(scorer.clips_from_codes(codes, codec))
            features[name] = scorer.embed_clips(
                clips, embedders.values(), name, len(share), quiet=True
            )
        return features

    def _gather(self, features: dict[str, scorer.Features]) -> dict[str, scorer.Features]:
        """Features of all ranks, for the embedders that every rank could load. Collective."""
        local = set(features[MODEL])
        common = set.intersection(*all_gather_list([local]))
        if missing := local - common:
            rank_zero_warn(
                f"no metrics of {', '.join(sorted(missing))}: another rank has no weights for them"
            )
        gathered = {}
        for system, parts in features.items():
            gathered[system] = scorer.gather_features({name: parts[name] for name in common})
        return gathered

    def _load_embedders(self, trainer: L.Trainer, module: MagnetModule) -> dict[str, Embedder]:
        """The embedders whose weights are available, loaded once.

        Raises:
            UserError: if weights are missing outside of training, or if checkpoint.monitor needs
                them.
        """
        if self._embedders is not None:
            return self._embedders
        embedders: dict[str, Embedder] = {}
        for name in dict.fromkeys(parse_metric(metric)[1] for metric in self.metrics):
            try:
                embedder = load_embedder(name, device=str(module.device))
            except UserError as error:
                if not (self.within_fit or trainer.state.fn == "fit"):
                    raise
                monitors = [getattr(c, "monitor", None) or "" for c in trainer.checkpoint_callbacks]
                if any(m.startswith("val/") and f"/{name}" in m for m in monitors):
                    raise _monitors_missing(name, error) from error
                rank_zero_warn(f"no metrics of {name}: {error}")
                continue
            if module.crop_s < embedder.min_duration_s:
                rank_zero_warn(
                    f"no metrics of {name}: it needs clips of {embedder.min_duration_s:.2f} s, "
                    f"these have {module.crop_s} s"
                )
                continue
            embedders[name] = embedder
        self._embedders = embedders
        return embedders

    def _load_references(
        self, trainer: L.Trainer, features: scorer.Features, real: dict[str, dict[str, Tensor]]
    ) -> dict[str, ReferenceStatistics]:
        """Statistics of the real clips by embedder, from the shards (`real`) or `reference`."""
        found: dict[str, ReferenceStatistics] = {}
        for name in embedders_with_reference(self.metrics):
            file = None if self.reference is None else Path(self.reference) / f"{name}.safetensors"
            if name not in features:
                continue
            if name == "musicnn" and real["embeddings"]:
                index = self._shards(trainer).index
                files = [str(shard.get("sha256")) for shard in index["shards"]]
                shards = FeatureSet(features[name].embedder, real["embeddings"], real["tags"])
                found[name] = shards.statistics(names=[*real["embeddings"], *files])
            elif file is not None and (name != "music" or file.is_file()):
                found[name] = load_reference(file, features[name].embedder)
            elif name == "music" and self._codec_music is not None:
                found[name] = self._codec_music
        return found

    def _score_baselines(
        self,
        features: Mapping[str, scorer.Features],
        references: Mapping[str, ReferenceStatistics],
        captions: Mapping[str, str],
    ) -> None:
        """Compute the baselines' values, if their features exist."""
        for name in BASELINES:
            if name in features:
                records = self._score(features[name], references, captions, {"system": name})
                self._baseline_values[name] = {
                    record.metric: record.value
                    for record in records
                    if not self._compares_with_itself(name, record.metric, references)
                }

    def _compares_with_itself(
        self, name: str, metric: str, references: Mapping[str, ReferenceStatistics]
    ) -> bool:
        """Whether a baseline's value is a distance of the codec's clips to themselves."""
        is_reference = references.get("music") is self._codec_music
        is_music = metric.startswith("music/") and scorer.compares_sets(metric)
        return name == "codec" and is_music and is_reference

    def _score(
        self,
        features: scorer.Features,
        references: Mapping[str, ReferenceStatistics],
        captions: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> list[Record]:
        """Records of all metrics that can be computed, with a warning for each other one."""
        codec = self._baseline_values.get("codec", {})
        return scorer.score_clips(
            self.metrics,
            features,
            references,
            captions,
            baselines={metric: {"baseline_codec": value} for metric, value in codec.items()},
            on_error=self._warn,
            level=scorer.SCORED_LEVEL,
            **about,
        )

    @staticmethod
    def _warn(metric: str, message: str) -> None:
        """A warning instead of an error, for too few clips or a missing reference."""
        if message.startswith(f"{metric}: no reference"):
            remedy = how_to_give_reference(parse_metric(metric)[1])
            message = f"the validation shards have no references; {remedy}"
        rank_zero_warn(f"no {metric}: {message}")

    def _note_clip_scores(
        self, features: scorer.Features, references: Mapping[str, ReferenceStatistics]
    ) -> None:
        """Add each written clip's FAD to its JSON; the report shows the best and the worst."""
        _, scores = scorer.scores_by_clip(self.metrics, features, references)
        for path in self.audio:
            note = path.with_suffix(".json")
            about = json.loads(note.read_text())
            if about.get("item") in scores:
                write_json(note, about | {"score": scores[about["item"]]})

    def _log(self, module: MagnetModule, records: list[Record], num_clips: int) -> None:
        values = {"val/num_clips": float(num_clips)}
        for record in records:
            values[f"val/{record.metric}"] = record.value
            if record.interval is not None:
                low, high = record.interval
                values[f"val/{record.metric}_ci95"] = (high - low) / 2
        for name, baseline in self._baseline_values.items():
            for metric, value in baseline.items():
                values[f"val/{metric}/baseline_{name}"] = value
        # Every rank has the same values, so that each can choose the best checkpoint.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
            module.log_dict(values, sync_dist=False)

    # --- Files ------------------------------------------------------------------------------------

    def _write(
        self,
        trainer: L.Trainer,
        module: MagnetModule,
        item: DecodedItem,
        real: ChosenItem,
        codec: Codec,
    ) -> None:
        """Write audio, JSON, codes and plot of one clip, with the codec's reconstruction."""
        path = self._folder(trainer, module) / f"{real.number:02d}_{slug(item.caption)}.wav"
        about = {
            "seed": self.seed,
            "step": self.step(trainer, module),
            "decoding": asdict(self._settings(module)),
        }
        scorer.write_decoded(path, item, about, with_codes=True)
        reconstruction = codec.decode(real.codes[None].to(codec.device))[0]
        plot = path.with_suffix(".png")
        wavs = {
            f"generated: {item.caption}": item.wav.mean(0).cpu().numpy(),
            "codec reconstruction of the real clip": reconstruction.mean(0).cpu().numpy(),
        }
        save_plot(plot, wavs, item.sample_rate, item.unmask_step.cpu().numpy())
        reference = path.parent.parent / scorer.CODEC_FOLDER / path.name
        if not reference.exists():  # the same in every validation
            about = {"prompt": item.caption, "item": item.key}
            write_audio(reference, reconstruction.T.cpu().numpy(), item.sample_rate, about)
        self.audio.append(path)
        self.plots.append(plot)

    def _about(self, trainer: L.Trainer, module: MagnetModule) -> dict[str, Any]:
        """Fields of the records of the generated clips."""
        return {
            "system": f"step {self.step(trainer, module)}",
            "decoding": asdict(self._settings(module)),
            "seed": self.seed,
        }

    def _settings(self, module: MagnetModule) -> DecodingConfig:
        """Decoding settings with the span length of training."""
        return replace(self.decoding, span_len=module.span_len)

    @staticmethod
    def step(trainer: L.Trainer, module: MagnetModule) -> int:
        """Optimizer steps of the weights; outside `fit`, those of the checkpoint."""
        return trainer.global_step or module.trained_steps

    def _folder(self, trainer: L.Trainer, module: MagnetModule) -> Path:
        split = "test" if trainer.testing else "validation"
        return Path(trainer.default_root_dir) / split / f"step_{self.step(trainer, module):07d}"

    @staticmethod
    def _shards(trainer: L.Trainer) -> ShardSet:
        """Shards of the split in use."""
        split = "test" if trainer.testing else "validation"
        return trainer.datamodule.shards(split)  # type: ignore


def _monitors_missing(name: str, error: UserError) -> UserError:
    return UserError(f"checkpoint.monitor is a metric of {name}, and {error}")


def how_to_give_reference(embedder: str) -> str:
    """Remedy for missing references of an embedder, as the end of a message."""
    if embedder == "musicnn":
        return "tokenize with --embedder musicnn"
    return "give --generation.reference"


def embedders_with_reference(metrics: Sequence[str]) -> list[str]:
    """Embedders of the metrics that need a reference.

    >>> embedders_with_reference(["fad/vggish", "kl/passt", "text/clap", "music/beat"])
    ['vggish', 'passt']
    """
    parsed = map(parse_metric, metrics)
    return list(dict.fromkeys(name for metric, name in parsed if metric in REFERENCE_METRICS))


def chosen_items(counts: list[int], num_prompts: int) -> dict[int, int]:
    """Maps the indices of the chosen items, spread over the split, to 0, 1, …

    >>> chosen_items([5, 5], 4)
    {0: 0, 2: 1, 4: 2, 6: 3}
    """
    total = sum(counts)
    number = min(total, num_prompts)
    step = total / number if number and total < 2 * number else total // max(number, 1)
    return {int(i * step): i for i in range(number)}


class PredictionWriter(Callback):
    """Writes the output of `predict` to `predictions` in the run folder."""

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        folder = Path(trainer.default_root_dir) / "predictions"
        for i, (key, caption) in enumerate(zip(batch["keys"], batch["captions"], strict=True)):
            about = {"prompt": caption, "item": key, "step": trainer.global_step}
            wav = outputs["wav"][i].T.cpu().numpy()
            write_audio(folder / f"{safe_name(key)}.wav", wav, outputs["sample_rate"], about)
