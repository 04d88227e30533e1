"""`evaluate`: scores folders of audio, or a model, against a reference, with records.

list -> decode -> embed (`scorer`) -> gather -> score -> records, table, report, listening test.
Clips are split over the devices by their position in the sorted list and gathered by id. All
devices compute the metrics; rank 0 writes the files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.fabric import Fabric

from magnet_train.codec.base import load_codec
from magnet_train.common.audio_files import write_audio
from magnet_train.common.errors import UserError
from magnet_train.common.folders import writable_folder
from magnet_train.common.ranges import check_values
from magnet_train.data.manifest import Clip
from magnet_train.decoding.autoregressive import check_decoding
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.load_rescorer import check_rescorer
from magnet_train.evaluation import scorer
from magnet_train.evaluation.clips import (
    Clips,
    Reference,
    list_clips,
    load_captions,
    load_prompts,
    parse_systems,
    saved_statistics,
)
from magnet_train.evaluation.differences import differences_text, paired_differences
from magnet_train.evaluation.listening_test import (
    check_systems,
    export_listening_test,
    group_by_caption,
)
from magnet_train.evaluation.ratings import analyse_ratings
from magnet_train.evaluation.report import Report, ReportClip, load_grids, write_report
from magnet_train.evaluation.run_report import REAL
from magnet_train.generator import DecodedItem, load
from magnet_train.metrics.distributed import raise_on_all_ranks
from magnet_train.metrics.embedders import EMBEDDERS, Embedder
from magnet_train.metrics.kl import CONVENTIONS
from magnet_train.metrics.published import PUBLISHED, RECIPES
from magnet_train.metrics.record import Record, markdown_table, write_records
from magnet_train.metrics.scoring import REFERENCE_METRICS, parse_metric
from magnet_train.release import SavedModel

DEFAULT_METRICS = ("fad/musicnn", "kl/musicnn", "text/musicnn")
"""Metrics whose networks are bundled."""
PUBLISHED_SIZES = {"MusicCaps": (5469, 5521)}
"""Numbers of clips of a complete set: as used by audiocraft, and all."""
MAX_DEVICES = max(16, os.cpu_count() or 1)
"""GPUs of a machine, or processes on its CPU."""
NUM_SHOWN = 8
"""Prompts in a report, besides the three best and worst clips of each system."""
NUM_RANKED = 3


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`."""

    generated: list[str] = field(default_factory=list)
    """Folders of audio files, as FOLDER or NAME=FOLDER; one table row per folder."""
    reference: str | None = None
    """Folder of real audio, or statistics written by --save_reference (their folder or one of its
    files)."""
    captions: Path | None = None
    """JSONL or CSV with path and caption of every clip (default: .txt or .json files next to the
    clips)."""
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    """Metrics, METRIC/EMBEDDER each."""
    checkpoint: str | None = None
    """Release folder, hub id, checkpoint, run folder or "demo": also generate for --prompts and
    score the result."""
    prompts: Path | None = None
    """Captions to generate for: a text file with one per line, or JSONL or CSV with path and
    caption."""
    generated_to: Path = Path("evaluated")
    """Folder for clips generated with --checkpoint; one subfolder per model, seed, settings and
    prompts."""
    seed: int = 0
    """Seed of the decoding noise."""
    batch_size: int = 4
    """Clips per batch of the decoder."""
    out: Path | None = None
    """Write the records to this JSON file."""
    save_reference: Path | None = None
    """Write the statistics of the reference, one file per embedder, to this folder, for later use
    as --reference."""
    loudness: bool = True
    """Normalise generated clips to -14 LUFS before they are embedded, as in published metrics; real
    clips are never normalised."""
    keep_silent: bool = False
    """Score silent generated clips instead of stopping with an error."""
    kl_convention: str | None = None
    """Convention of KL, such as stable-audio-metrics (default: that of the classifier)."""
    codec: str | None = None
    """Also score this codec's reconstructions of the reference as a baseline: "demo", a folder or a
    hub id."""
    published_set: str | None = None
    """MusicCaps or AudioCaps, if --reference is that complete set: adds published results to the
    table."""
    weights: dict[str, str] = field(default_factory=dict)
    """Weight files by network, e.g. {vggish: FILE}; downloaded if omitted. For "codec": name of the
    codec."""
    force: bool = False
    """Tabulate metrics with different protocols together, with a note."""
    report: Path | None = None
    """Write an HTML report with players, spectrograms and metrics."""
    listening_test: Path | None = None
    """Write a blind listening test of all systems and the reference as HTML, and its key next to
    it."""
    study: Path | None = None
    """Key file of the listening test whose --ratings are analysed."""
    ratings: list[Path] = field(default_factory=list)
    """CSV files of the raters of --study."""
    accelerator: str = "auto"
    """Device type: cpu, gpu or auto."""
    devices: int = 1
    """Number of GPUs, or of processes on a CPU."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            parse_metric(metric)
        self._check_combinations()
        check_values(self, "--", batch_size="[1, 100000]", devices=f"[1, {MAX_DEVICES}]")
        if unknown := set(self.weights) - set(EMBEDDERS):
            raise UserError(f"--weights {min(unknown)}: choose from {', '.join(EMBEDDERS)}")
        if self.kl_convention not in (None, *CONVENTIONS):
            raise UserError(
                f"--kl_convention {self.kl_convention}: choose from {', '.join(CONVENTIONS)}"
            )
        if self.published_set not in (None, *RECIPES):
            raise UserError(f"--published_set {self.published_set}: choose MusicCaps or AudioCaps")
        for name in ("out", "report", "listening_test"):
            _check_writable(f"--{name}", getattr(self, name), is_folder=False)
        _check_writable("--save_reference", self.save_reference, is_folder=True)

    def _check_combinations(self) -> None:
        if (self.study is None) != (not self.ratings):
            raise UserError("--study and --ratings belong together: give both")
        if (self.checkpoint is None) != (self.prompts is None):
            raise UserError("--checkpoint and --prompts belong together: give both")
        if not self.has_clips and self.study is None:
            raise UserError(
                "nothing to score: give --generated FOLDER, or --checkpoint with --prompts"
            )
        if self.save_reference is not None and (
            self.reference is None or saved_statistics(self.reference)
        ):
            raise UserError("--save_reference: needs --reference FOLDER with audio")

    @property
    def has_clips(self) -> bool:
        """Whether there are clips to embed."""
        return (
            bool(self.generated) or self.checkpoint is not None or self.save_reference is not None
        )


def _check_writable(option: str, path: Path | None, is_folder: bool) -> None:
    """Check that a file or folder can be written before scoring starts."""
    if path is None:
        return
    writable_folder(path if is_folder else path.parent, option)
    if not is_folder and path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file name")


def evaluate(options: EvaluateOptions, decoding: Mapping[str, Any] | None = None) -> list[Record]:
    """Score all systems. All ranks return the records; rank 0 writes tables and files.

    Args:
        options: options of `evaluate`.
        decoding: decoding settings that override the checkpoint's.

    Raises:
        UserError: if anything cannot be scored; metrics are never computed over fewer clips.
    """
    fabric = _launch(options)
    if options.study is not None and fabric.global_rank == 0:
        print(analyse_ratings(options.ratings, options.study).to_markdown())
    if not options.has_clips:
        return []
    run = _Evaluation(options, decoding or {}, fabric)
    with raise_on_all_ranks():
        run.open()
        run.embed()
    run.gather()
    records = run.score()
    if fabric.global_rank == 0:
        run.publish(records)
    return records


def _launch(options: EvaluateOptions) -> Fabric:
    try:
        strategy = "auto" if options.devices == 1 else "ddp"
        fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    except Exception as error:  # Lightning raises several types
        what = f"--accelerator {options.accelerator} --devices {options.devices}"
        raise UserError(f"{what}: {str(error).splitlines()[0]}; choose cpu, gpu or auto") from error
    fabric.launch()
    return fabric


class _Evaluation:
    """State of one call of `evaluate`."""

    def __init__(self, options: EvaluateOptions, decoding: Mapping[str, Any], fabric: Fabric):
        self.options = options
        self.given_decoding = decoding
        self.fabric = fabric
        self.systems: dict[str, Clips] = {}
        self.prompts: dict[str, str] = {}
        self.embedders: list[Embedder] = []
        self.reference = Reference()
        self.features: dict[str, scorer.Features] = {}
        """Features by system."""
        self.real_features: scorer.Features = {}
        self.codec_features: scorer.Features = {}
        """Features of the codec's reconstructions of the reference."""
        self.decoded = ""
        """System name of the clips generated with --checkpoint, if any."""
        self.decoding: DecodingConfig | None = None
        """Their decoding settings."""

    def open(self) -> None:
        """List clips, load networks, and check everything that can be checked before scoring.

        Raises:
            UserError: if a folder, file or option is invalid.
        """
        options = self.options
        self.systems = {
            name: list_clips(folder) for name, folder in parse_systems(options.generated).items()
        }
        if options.prompts is not None:
            self.prompts = load_prompts(options.prompts)
            self._add_decoded()
        needing = [m for m in options.metrics if parse_metric(m)[0] in REFERENCE_METRICS]
        if needing and options.reference is None:
            raise UserError(
                f"{needing[0]} needs --reference: a folder of real audio, or saved statistics"
            )
        self.embedders = scorer.load_embedders(
            options.metrics, options.weights, str(self.fabric.device)
        )
        self.reference = Reference.open(options.reference, self.embedders)
        if options.codec is not None and not self.reference.clips:
            raise UserError(
                "--codec: its baseline needs the reference as audio; give its folder as --reference"
            )
        captions = self._captions_by_system()
        for metric in options.metrics:
            self._check_pairs(metric)
            self._check_captions(metric, captions)
        if options.listening_test is not None:
            systems, captions = self._listening_systems()
            check_systems(
                {
                    name: group_by_caption(name, clips, captions[name])
                    for name, clips in systems.items()
                },
                "reference" if self.reference.clips else None,
            )

    def _add_decoded(self) -> None:
        """Add the clips that --checkpoint will generate."""
        options = self.options
        saved = SavedModel.open(str(options.checkpoint))
        self.decoding = saved.decoding.updated(self.given_decoding)
        check_decoding(saved.network, self.decoding, saved.crop_s)
        if self.decoding.rescorer is not None:
            check_rescorer(self.decoding.rescorer, saved.codec)
        self.decoded = "ours" if "ours" not in self.systems else str(options.checkpoint)
        folder = options.generated_to / _folder_name(options, self.given_decoding, self.prompts)
        self.systems[self.decoded] = {
            key: Clip(folder / f"{key}.wav", f"{key}.wav", caption)
            for key, caption in self.prompts.items()
        }

    def _check_pairs(self, metric: str) -> None:
        name, embedder = parse_metric(metric)
        if name != "kl":
            return
        real = self.reference.paired_ids(embedder)
        for keys in self.systems.values():
            if missing := [key for key in keys if key not in real]:
                raise UserError(
                    f"{metric}: clip {missing[0]} has no counterpart in the reference; KL pairs "
                    "clips by name: give --prompts as JSONL or CSV with the paths of the real "
                    "clips, or remove KL from --metrics"
                )

    def _check_captions(self, metric: str, captions: Mapping[str, Mapping[str, str]]) -> None:
        if not parse_metric(metric)[0].startswith("text"):
            return
        for system, keys in self.systems.items():
            if missing := [key for key in keys if not captions[system].get(key)]:
                raise UserError(f"{metric}: clip {missing[0]} has no caption; give --captions")

    def embed(self) -> None:
        """Decode and embed this rank's share of all clips. No collective.

        Raises:
            UserError: if a clip cannot be embedded.
        """
        real = self._share(self.reference.clips)
        clips = scorer.prepare_reference(self._read(real))
        self.real_features = self._embed(clips, "reference", len(real))
        for system, clips in self.systems.items():
            share = self._share(clips)
            source = self._decode(share) if system == self.decoded else self._read(share)
            self.features[system] = self._embed(self._prepare(source), system, len(share))
        if self.options.codec is not None:
            codec = load_codec(self.options.codec).to(self.fabric.device)
            clips = scorer.reconstructed_clips(self._read(real), codec)
            clips = scorer.prepare_generated(clips, self.options.loudness)
            self.codec_features = self._embed(clips, "codec", len(real))

    def _share(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Every world_size-th item, starting with this rank's first."""
        return dict(list(items.items())[self.fabric.global_rank :: self.fabric.world_size])

    @staticmethod
    def _read(clips: Clips) -> Iterator[scorer.AudioClip]:
        return scorer.read_clips({key: clip.path for key, clip in clips.items()})

    def _embed(self, clips: Any, system: str, total: int) -> scorer.Features:
        is_decoded = system == self.decoded
        return scorer.embed_clips(
            clips,
            self.embedders,
            f"{'decoding' if is_decoded else 'embedding'} {system}",
            total,
            quiet=self.fabric.global_rank > 0,
            batch_size=self.options.batch_size if is_decoded else 1,
        )

    def _prepare(self, clips: Any) -> Any:
        options = self.options
        return scorer.prepare_generated(
            clips, options.loudness, options.keep_silent, self.reference.seconds
        )

    def _decode(self, share: Clips) -> Iterator[scorer.AudioClip]:
        """Generates and writes the clips of --checkpoint."""
        options = self.options
        assert options.checkpoint is not None
        generator = load(options.checkpoint, self.fabric.device)
        captions = {key: clip.caption for key, clip in share.items()}
        items = generator.decode_items(captions, options.batch_size, options.seed, self.decoding)
        for clip in scorer.decoded_clips(self._write(items)):
            yield replace(clip, name=str(share[clip.key].path))

    def _write(self, items: Iterable[DecodedItem]) -> Iterator[DecodedItem]:
        """Writes each item and passes it on; items of the report are written with their codes."""
        options = self.options
        assert self.decoding is not None
        shown = set(list(self.prompts)[:NUM_SHOWN])
        about = {
            "seed": options.seed,
            "checkpoint": options.checkpoint,
            "decoding": asdict(self.decoding),
        }
        for item in items:
            path = self.systems[self.decoded][item.key].path
            scorer.write_decoded(path, item, about, with_codes=item.key in shown)
            yield item

    def gather(self) -> None:
        """Gather all features on all ranks. Collective."""
        self.real_features = scorer.gather_features(self.real_features)
        self.codec_features = scorer.gather_features(self.codec_features)
        self.features = {
            system: scorer.gather_features(part) for system, part in self.features.items()
        }
        if self.reference.clips:
            self.reference.compute_statistics(self.real_features)

    def score(self) -> list[Record]:
        """Records of all systems and metrics.

        Raises:
            UserError: if a metric cannot be computed.
        """
        options = self.options
        baselines = self._baselines()
        records = []
        for system in self.systems:
            fields: dict[str, Any] = {"system": system}
            fields["level"] = scorer.SCORED_LEVEL if options.loudness else scorer.UNCHANGED_LEVEL
            if system == self.decoded:
                assert self.decoding is not None
                fields |= {"decoding": asdict(self.decoding), "seed": options.seed}
            records += scorer.score_clips(
                options.metrics,
                self.features[system],
                self.reference.statistics,
                self.captions(system),
                options.kl_convention,
                baselines,
                **fields,
            )
        return [self._with_published_protocol(record) for record in records]

    def captions(self, system: str) -> dict[str, str]:
        """Captions of a system's clips: from prompts, a manifest, sidecar files or the
        reference."""
        if system == self.decoded:
            return self.prompts
        clips = self.systems[system]
        return load_captions(self.options.captions, clips) or load_captions(
            None, self.reference.clips
        )

    def _captions_by_system(self) -> dict[str, dict[str, str]]:
        return {system: self.captions(system) for system in self.systems}

    def _baselines(self) -> dict[str, dict[str, float]]:
        """Baselines of each metric: real against real clips, and codec reconstructions."""
        baselines: dict[str, dict[str, float]] = {metric: {} for metric in self.options.metrics}
        if not self.reference.clips:
            return baselines
        captions = load_captions(None, self.reference.clips)
        for metric, found in baselines.items():
            if scorer.compares_sets(metric):
                # Too few clips for the baseline; the metric may still be valid.
                with suppress(UserError):
                    found["baseline_real"] = scorer.score_halves(
                        metric, self.real_features[parse_metric(metric)[1]]
                    )
            elif parse_metric(metric)[0].startswith("text") or metric.startswith("music/"):
                found |= self._baseline(metric, "baseline_real", self.real_features, captions)
            found |= self._baseline(metric, "baseline_codec", self.codec_features, captions)
        return baselines

    def _baseline(
        self, metric: str, name: str, features: scorer.Features, captions: Mapping[str, str]
    ) -> dict[str, float]:
        """The metric of these features by baseline name; empty if it cannot be computed."""
        records = scorer.score_clips(
            [metric],
            features,
            self.reference.statistics,
            captions,
            self.options.kl_convention,
            on_error=lambda metric, message: None,
            system=name,
        )
        return {name: records[0].value} if records else {}

    def _with_published_protocol(self, record: Record) -> Record:
        """Add the name of the published protocol if it was followed with the complete set."""
        name = self.options.published_set or ""
        num_real = len(self.reference.clips)
        is_followed = (
            record.metric in RECIPES.get(name, ())
            and record.level == scorer.SCORED_LEVEL
            and record.convention in (None, "audiocraft")
            and record.num_clips in PUBLISHED_SIZES.get(name, (num_real,))
            and record.num_clips == num_real
        )
        return replace(record, published_protocol=f"audiocraft/{name}") if is_followed else record

    def publish(self, records: list[Record]) -> None:
        """Write and print the requested outputs; records first, in case the table fails."""
        options = self.options
        if options.out is not None:
            write_records(options.out, records)
            print(f"records: {options.out}")
        if options.save_reference is not None:
            for name, part in self.reference.statistics.items():
                part.save(options.save_reference / f"{name}.safetensors")
            print(f"reference: {options.save_reference}")
        try:
            if records:
                print(markdown_table(records, options.force, PUBLISHED))
                print(self._differences(), end="")
        finally:  # a refused table costs no other file
            self._write_pages(records)

    def _write_pages(self, records: list[Record]) -> None:
        """Write the report and the listening test, if requested."""
        options = self.options
        if options.report is not None:
            with TemporaryDirectory() as folder:
                write_report(options.report, self._report(records, Path(folder)))
            print(f"report: {options.report}")
        if options.listening_test is not None:
            systems, captions = self._listening_systems()
            reference = "reference" if self.reference.clips else None
            test = export_listening_test(systems, captions, options.listening_test, reference)
            print(f"listening test: {test.page} ({test.num_trials} captions), its key: {test.key}")

    def _differences(self) -> str:
        """Differences from the first system, paired by clip; empty for a single system."""
        if len(self.systems) < 2:
            return ""
        found = paired_differences(
            self.options.metrics,
            self.features,
            self.reference.statistics,
            self._captions_by_system(),
            self.options.kl_convention,
        )
        text = differences_text(next(iter(self.systems)), found)
        return f"{text}\n" if text else ""

    def _listening_systems(self) -> tuple[dict[str, Clips], dict[str, dict[str, str]]]:
        """Clips and captions of all systems, with the real clips as "reference"."""
        systems = dict(self.systems)
        captions = self._captions_by_system()
        if self.reference.clips:
            systems["reference"] = self.reference.clips
            captions["reference"] = load_captions(None, self.reference.clips)
        return systems, captions

    def _report(self, records: list[Record], folder: Path) -> Report:
        """A report with the first prompts, and the best and worst clips of each system.

        The codec's reconstructions are written into `folder`.
        """
        scores: dict[str, dict[str, float]] = {}
        embedder = ""
        for system, features in self.features.items():
            name, values = scorer.scores_by_clip(
                self.options.metrics, features, self.reference.statistics
            )
            embedder = embedder or name
            scores[system] = values
        keys: dict[str, None] = {}
        for system, clips in self.systems.items():
            ranked = list(scores[system])
            keys |= dict.fromkeys(
                [*list(clips)[:NUM_SHOWN], *ranked[:NUM_RANKED], *ranked[-NUM_RANKED:]]
            )
        captions = self._captions_by_system()
        reconstructed = self._reconstruct(keys, folder)
        rows = [self._report_row(key, scores, captions, reconstructed.get(key)) for key in keys]
        settings = {
            name: str(value)
            for name, value in asdict(self.options).items()
            if value not in (None, [], {})
        }
        title = f"FAD of the single clip ({embedder})" if embedder else "score"
        shown = [asdict(record) for record in records]
        return Report("Evaluation", settings, rows, records=shown, score=title)

    def _reconstruct(self, keys: Iterable[str], folder: Path) -> dict[str, Path]:
        """Files of the codec's reconstructions of real clips, by key; empty without --codec."""
        if self.options.codec is None:
            return {}
        codec = load_codec(self.options.codec).to(self.fabric.device)
        real = {key: self.reference.clips[key] for key in keys if key in self.reference.clips}
        files: dict[str, Path] = {}
        for i, clip in enumerate(scorer.reconstructed_clips(self._read(real), codec)):
            files[clip.key] = folder / f"{i}.wav"
            write_audio(files[clip.key], clip.wav.T.numpy(), clip.sample_rate, {})
        return files

    def _report_row(
        self,
        key: str,
        scores: Mapping[str, Mapping[str, float]],
        captions: Mapping[str, Mapping[str, str]],
        reconstructed: Path | None,
    ) -> dict[str, ReportClip]:
        """A clip of every system, with the real one and its reconstruction."""
        row: dict[str, ReportClip] = {}
        for system, clips in self.systems.items():
            if key in clips:
                path = clips[key].path
                caption = captions[system].get(key, key)
                row[system] = ReportClip(path, caption, *load_grids(path), scores[system].get(key))
        if key in self.reference.clips:
            real = self.reference.clips[key]
            row["real"] = ReportClip(real.path, real.caption or key)
            if reconstructed:
                row[REAL] = ReportClip(reconstructed, real.caption or key)
        return row


def _folder_name(
    options: EvaluateOptions, decoding: Mapping[str, Any], prompts: Mapping[str, str]
) -> str:
    """A unique folder name per model, seed, decoding settings and prompts."""
    what = json.dumps(
        [options.checkpoint, options.seed, dict(decoding), dict(prompts)],
        sort_keys=True,
        default=str,
    )
    settings_hash = hashlib.sha256(what.encode()).hexdigest()[:8]
    return f"{Path(str(options.checkpoint)).stem}_seed{options.seed}_{settings_hash}"
