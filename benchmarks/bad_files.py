"""Hypothesis strategies for invalid files of all types, and the readers that must use them or
refuse them in one line."""

import csv
import hashlib
import io
import json
import shutil
import signal
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from helpers_data import make_data_codec, write_clip, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_components import make_t5

from magnet_train.common.errors import UserError

LONGEST_S = 10.0
"""Time of the processor that a bad file may take."""
MANY = 1 << 62
NUMBERS = (0, -1, 1, 2**31, MANY, 10**20, -(10**20), 10**400, 1e308, -1e308, 5e-324, 0.5)
WORDS = (
    "",
    " ",
    "nan",
    "None",
    "\u2028",
    "\x00",
    "../../x",
    "/etc/passwd",
    "é",
    "\ud800",
    "a" * 9999,
)


# --- values ---------------------------------------------------------------------------------------


def numbers() -> st.SearchStrategy[Any]:
    """Numbers at or beyond the limits of valid values."""
    return st.sampled_from(NUMBERS) | st.integers() | st.floats()


def texts() -> st.SearchStrategy[str]:
    return st.sampled_from(WORDS) | st.text(max_size=20)


def deep(depth: int) -> bytes:
    """Deeply nested JSON lists."""
    return b"[" * depth + b"]" * depth


def values() -> st.SearchStrategy[Any]:
    """Any JSON value."""
    plain = st.none() | st.booleans() | numbers() | texts()
    lists = st.lists(plain, max_size=3) | st.dictionaries(texts(), plain, max_size=3)
    return plain | lists | st.just(json.loads(deep(50)))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some values changed, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 19)) == 0:
            return draw(values())
        place, parents = value, []
        while isinstance(place, dict | list) and len(place) > 0:
            parents.append(place)
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys)))
            place = place[key]
            if draw(st.integers(0, 3)) == 0:
                break
        if not parents:
            return draw(values())
        change = draw(st.integers(0, 9))
        if change == 0:
            del parents[-1][key]
        elif change == 1 and isinstance(parents[-1], dict):
            parents[-1][draw(texts())] = draw(values())
        elif change == 2 and isinstance(parents[-1], list):
            parents[-1].append(parents[-1][0])
        else:
            parents[-1][key] = draw(values())
    return value


def as_json(value: Any) -> bytes:
    """JSON text; lone surrogates are written as escapes."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes truncated, flipped, overwritten, duplicated or inserted."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        head = draw(st.booleans())
        at = at % 600 if head else at
        change = draw(st.integers(0, 6))
        if change == 0 and found:
            found[at % len(found)] ^= 1 << draw(st.integers(0, 7))
        elif change == 1:
            found[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
        elif change == 2:
            found[at : at + 4] = draw(
                st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f"])
            )
        elif change == 3:
            del found[at:]
        elif change == 4:
            del found[at : at + draw(st.integers(1, 600))]
        elif change == 5:
            found[at:at] = draw(st.binary(max_size=20))
        else:
            found += found[at : at + 4096]
    return bytes(found)


def lines(good: list[str], words: list[str]) -> st.SearchStrategy[bytes]:
    """Text of valid lines, parts of valid lines, and arbitrary text."""
    piece = st.sampled_from([*words, '"', ",", "\t", "{", "}", "[", "\\", ":", "'"]) | texts()
    line = st.sampled_from(good) | st.lists(piece, max_size=8).map("".join)
    text = st.lists(line, max_size=6).map("\n".join)
    head = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])
    return st.tuples(head, text).map(lambda parts: parts[0] + parts[1].encode(errors="replace"))


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Valid files of all types, from which invalid ones are made; each folder is made once."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """`folder / name`, created if absent."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    @property
    def codec(self) -> Path:
        return self.made("codec", make_data_codec)

    @property
    def shards(self) -> Path:
        return self.made("shards", lambda path: write_shards(path, str(self.codec), (2, 2), 20))

    def audio(self, suffix: str, **kind: Any) -> bytes:
        path = self.made(f"clip{suffix}", lambda path: write_clip(path, 0.3, None, 16_000, **kind))
        return path.read_bytes()

    @property
    def network(self) -> Any:
        """A very small network for the demo codec's codes."""
        from magnet_train.codec.base import load_codec
        from magnet_train.model import MagnetConfig

        facts = load_codec("demo").facts
        k, c = facts.num_codebooks, facts.codebook_size
        return MagnetConfig(8, 2, 1, num_codebooks=k, codebook_size=c, text_dim=8)

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The parts that are read, with the weights of a very small network."""
        from magnet_train.model import Magnet

        config = self.network
        settings = {"network": config.to_dict(), "codec": "demo", "text_encoder": "demo"}
        settings |= {"crop_s": 2.0, "span_len": 3, "guidance_dropout": 0.3}
        weights = {f"network.{k}": v for k, v in Magnet(config).state_dict().items()}
        parts: dict[str, Any] = {"state_dict": weights, "hyper_parameters": settings}
        parts |= {
            "pytorch-lightning_version": "2.6.6",
            "global_step": 7,
            "callbacks": {},
            "optimizer_states": [],
        }
        return parts | {"lr_schedulers": [], "loops": {}}

    @property
    def release(self) -> Path:
        """A release without its own components."""
        from magnet_train.decoding.decode import DecodingConfig
        from magnet_train.model import Magnet
        from magnet_train.release import SavedModel, write_release

        def make(path: Path) -> None:
            config = self.network
            saved = SavedModel(path, config, {"id": "demo"}, "demo", 2.0, DecodingConfig())
            weights = Magnet(config).state_dict()
            write_release(path, saved, {k: lambda v=v: v for k, v in weights.items()})

        return self.made("release", make)

    @property
    def adapter(self) -> Path:
        """A LoRA adapter of the network."""
        from magnet_train.adapters import LoraConfig, adapt, adapter_tensors, write_adapter
        from magnet_train.model import Magnet

        def make(path: Path) -> None:
            network, config = Magnet(self.network), LoraConfig(rank=2)
            adapt(network, config, torch.Generator().manual_seed(0))
            write_adapter(path, adapter_tensors(network.state_dict()), config, "base", "0")

        return self.made("adapter", make)

    @property
    def listening_key(self) -> dict[str, Any]:
        """A key as written by `export_listening_test`, for two systems and one caption."""
        clips = {
            name: {"system": system, "trial": 1, "seconds": 1.0}
            for name, system in (("a1", "ours"), ("b2", "reference"))
        }
        return {
            "study": "s",
            "title": "t",
            "questions": ["quality", "relevance"],
            "systems": ["ours", "reference"],
            "reference": "reference",
            "clips": clips,
        }


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            with suppress(ValueError, UnicodeError):  # a name that no tar can hold
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@st.composite
def shards(draw: st.DrawFn, samples: Samples) -> bytes:
    """A shard with changed names, arrays, JSON or bytes."""
    good = sorted(samples.shards.glob("*.tar"))[0].read_bytes()
    if draw(st.booleans()):
        return draw(damaged(good))
    kinds = st.sampled_from([np.uint16, np.int64, np.float32, np.bool_])
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    array = npy(np.zeros(shape, draw(kinds)))
    codes = draw(st.sampled_from([array, npy(np.zeros((4, 9), np.uint16))]) | damaged(array))
    info = {"key": "k", "caption": "c", "duration_s": 0.2}
    about = as_json(draw(st.just(info) | changed(info)))
    key = draw(st.sampled_from(["k", "../k", "/k", "k/k", ".", ""]) | texts())
    members = [(f"{key}.codes.npy", codes), (f"{key}.json", draw(st.just(about) | damaged(about)))]
    if draw(st.booleans()):
        members.append((f"{key}.{draw(texts())}", b"x"))
    return tar_of(draw(st.permutations(members)))


@st.composite
def wav_heads(draw: st.DrawFn, content: bytes) -> bytes:
    """A WAV with a changed header field."""
    found = bytearray(content)
    offset, size = draw(
        st.sampled_from(
            [(4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4)]
        )
    )
    number = draw(st.sampled_from([0, 1, 3, 0x7FFF, 0xFFFF]) | st.integers(0, 2 ** (8 * size) - 1))
    found[offset : offset + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(found)


@st.composite
def audio(draw: st.DrawFn, samples: Samples) -> tuple[str, bytes]:
    """Suffix and content of an audio file."""
    suffix = draw(st.sampled_from([".wav", ".flac", ".ogg", ".mp3", ".aiff"]))
    content = samples.audio(suffix)
    if suffix == ".wav" and draw(st.booleans()):
        return suffix, draw(wav_heads(content))
    if draw(st.integers(0, 9)) == 0:  # of another kind than its name says
        suffix = draw(st.sampled_from([".wav", ".flac", ".ogg", ".mp3", ".aiff"]))
    return suffix, draw(damaged(content))


@st.composite
def ratings(draw: st.DrawFn, samples: Samples) -> tuple[bytes, bytes]:
    """Key and a rater's file."""
    from magnet_train.evaluation.ratings import COLUMNS

    key = samples.listening_key
    rows = [list(COLUMNS)] + [
        ["r", "1", clip, question, "90", "1.0", "1"]
        for clip in key["clips"]
        for question in key["questions"]
    ]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = str(draw(values()))
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    text = file.getvalue().encode(errors="replace")
    return as_json(draw(st.just(key) | changed(key))), draw(st.just(text) | damaged(text))


@st.composite
def checkpoints(draw: st.DrawFn, samples: Samples) -> bytes:
    """A checkpoint with changed settings, weights or bytes."""
    content = samples.checkpoint
    if draw(st.booleans()):
        settings = content["hyper_parameters"]
        content["hyper_parameters"] = draw(changed(settings))
    if draw(st.integers(0, 3)) == 0:
        content[draw(st.sampled_from(sorted(content)))] = draw(values())
    weights = content["state_dict"]
    if isinstance(weights, dict) and weights and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(weights)))
        other = [
            torch.zeros(3),
            torch.zeros(0),
            torch.full((8, 8), float("nan")),
            torch.ones(2).int(),
        ]
        weights[name] = draw(st.sampled_from([*other, None, 3, "x"]))
    file = io.BytesIO()
    torch.save(content, file)
    return draw(st.just(file.getvalue()) | damaged(file.getvalue()))


@st.composite
def releases(draw: st.DrawFn, samples: Samples) -> tuple[bytes, bytes]:
    """Configuration and weights of a release."""
    config = json.loads((samples.release / "config.json").read_text())
    weights = (samples.release / "model.safetensors").read_bytes()
    if draw(st.integers(0, 2)) == 0:
        weights = draw(damaged(weights))
        if draw(st.booleans()):  # by somebody who can compute a checksum
            config["sha256"] = hashlib.sha256(weights).hexdigest()
        return as_json(config), weights
    text = as_json(draw(changed(config)))
    return draw(st.just(text) | damaged(text)), weights


@st.composite
def adapters(draw: st.DrawFn, samples: Samples) -> tuple[bytes, bytes]:
    """Configuration and weights of an adapter."""
    config = json.loads((samples.adapter / "adapter_config.json").read_text())
    weights = (samples.adapter / "adapter_model.safetensors").read_bytes()
    return as_json(draw(st.just(config) | changed(config))), draw(
        st.just(weights) | damaged(weights)
    )


# --- readers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A reader of untrusted files."""

    strategy: Callable[[Samples], st.SearchStrategy[Any]]
    """Makes what is read."""
    read: Callable[[Path, Any, Samples], Any]
    """Called with an empty folder, what was made, and good files; raises UserError or uses it."""


def _read_shard(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.data.shards import read_shard

    (folder / "s.tar").write_bytes(content)
    for item in read_shard(folder / "s.tar", with_references=True):
        assert item["codes"].dtype == np.uint16 and item["codes"].size > 0
        assert isinstance(item["info"]["caption"], str) and item["info"]["duration_s"] > 0


def _read_index(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.data.pipeline import EvaluationDataset, TrainingStream
    from magnet_train.data.shards import ShardSet

    (folder / "index.json").write_bytes(content)
    for shard in samples.shards.glob("*.tar"):
        (folder / shard.name).symlink_to(shard)
    found = ShardSet.open(folder)
    assert sum(found.counts) > 0
    if max(found.counts) < 100:
        list(EvaluationDataset(found, 10, 2))
        next(iter(TrainingStream(found, 10, 2, seed=0)))


def _read_manifest(folder: Path, content: tuple[str, bytes], samples: Samples) -> None:
    from magnet_train.data.manifest import find_clips, read_prompts

    name, text = content
    (folder / name).write_bytes(text)
    for clip in find_clips(folder / name):
        assert "\n" not in clip.caption and json.dumps(clip.fields) and clip.id.encode()
    for caption in read_prompts(folder / name):
        assert caption and "\n" not in caption


def _read_sidecar(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.data.manifest import find_clips

    shutil.copy(samples.made("clip.wav", lambda p: write_clip(p, 0.3, None)), folder / "a.wav")
    (folder / "a.json").write_bytes(content)
    (folder / "a.txt").write_bytes(content)
    (clip,) = find_clips(folder)
    assert "\n" not in clip.caption + clip.error
    if clip.error:  # which tokenize lists
        raise UserError(clip.error)


def _read_audio(folder: Path, content: tuple[str, bytes], samples: Samples) -> None:
    from magnet_train.data.audio import duration_s, read_audio

    suffix, data = content
    (folder / f"a{suffix}").write_bytes(data)
    assert duration_s(folder / f"a{suffix}") > 0
    wav = read_audio(folder / f"a{suffix}", 16_000, 1)
    assert wav.shape[1] > 0 and np.isfinite(wav).all()


def _read_plan(folder: Path, content: tuple[str, bytes] | None, samples: Samples) -> None:
    from magnet_train.data.shards import ShardSet
    from magnet_train.data.tokenize import TokenizeOptions, tokenize

    source = folder / "in"
    source.mkdir()
    shutil.copy(samples.made("clip.wav", lambda p: write_clip(p, 0.3, None)), source / "a.wav")
    (source / "a.txt").write_text("a")
    if content is not None:
        shutil.copytree(samples.folder / "planned" / "out", folder / "out")
        (folder / "out" / content[0]).write_bytes(content[1])
    tokenize(source, folder / "out", TokenizeOptions(str(samples.codec), min_s=0.1))
    assert ShardSet.open(folder / "out").read(0)


def _read_configuration(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.cli.generate import GenerateOptions
    from magnet_train.cli.parser import make_parser
    from magnet_train.decoding.decode import DecodingConfig

    (folder / "c.yaml").write_bytes(content)
    parser = make_parser("generate", "")
    parser.add_class_arguments(GenerateOptions, nested_key=None, as_group=False)
    parser.add_class_arguments(DecodingConfig, "decoding", as_group=True)
    parser.parse_args(["--config", str(folder / "c.yaml")])


def _read_checkpoint(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.release import SavedModel
    from magnet_train.resume import newest_intact_checkpoint, read_training_checkpoint

    (folder / "last.ckpt").write_bytes(content)
    is_whole = newest_intact_checkpoint([folder]) is not None
    try:
        read_training_checkpoint(folder / "last.ckpt")
        assert is_whole
    except UserError:
        assert not is_whole
    network = SavedModel.open(folder / "last.ckpt").build()
    assert all(p.isfinite().all() for p in network.parameters())


def _read_release(folder: Path, content: tuple[bytes, bytes], samples: Samples) -> None:
    from magnet_train.release import SavedModel

    for name, data in zip(("config.json", "model.safetensors"), content, strict=True):
        (folder / name).write_bytes(data)
    network = SavedModel.open(folder).build()
    assert all(p.isfinite().all() for p in network.parameters())


def _read_ratings(folder: Path, content: tuple[bytes, bytes], samples: Samples) -> None:
    from magnet_train.evaluation.ratings import analyse_ratings

    for name, data in zip(("key.json", "r.csv"), content, strict=True):
        (folder / name).write_bytes(data)
    table = analyse_ratings([folder / "r.csv"], folder / "key.json", num_draws=10)
    assert table.to_markdown() and all(1 <= row.mean <= 100 for row in table.rows)


def _read_sweep(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.sweeps.sweep import read_sweep

    (folder / "s.yaml").write_bytes(content)
    assert read_sweep(folder / "s.yaml", folder / "runs")


def _read_codec(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.codec.base import load_codec

    shutil.copy(samples.codec / "model.safetensors", folder)
    (folder / "config.json").write_bytes(content)
    codec = load_codec(str(folder))
    codes = codec.encode(torch.zeros(1, 1, 800))
    assert codes.min() >= 0 and codes.max() < codec.facts.codebook_size


def _read_adapter(folder: Path, content: tuple[bytes, bytes], samples: Samples) -> None:
    from magnet_train.adapters import merged, read_adapter
    from magnet_train.model import Magnet

    names = ("adapter_config.json", "adapter_model.safetensors")
    for name, data in zip(names, content, strict=True):
        (folder / name).write_bytes(data)
    adapter = replace(read_adapter(str(folder)), base_hash=None)
    weights = merged(dict(Magnet(samples.network).state_dict()), [adapter])
    assert all(tensor.isfinite().all() for tensor in weights.values())


def _read_text_encoder(folder: Path, content: bytes, samples: Samples) -> None:
    from magnet_train.conditioning import load_text_encoder

    shutil.copytree(samples.made("t5", make_t5), folder / "t5")
    (folder / "t5" / "config.json").write_bytes(content)
    states, mask = load_text_encoder(str(folder / "t5"))(["a slow waltz"])
    assert mask.any() and states.shape[2] > 0


def _text_encoders(samples: Samples) -> st.SearchStrategy[bytes]:
    good = json.loads((samples.made("t5", make_t5) / "config.json").read_text())
    return changed(good).map(as_json) | damaged(as_json(good))


def _manifests(samples: Samples) -> st.SearchStrategy[tuple[str, bytes]]:
    good = [
        '{"path": "a.wav", "caption": "x"}',
        '{"audio_filepath": "a.wav", "text": "x", "offset": 1, "duration": 2}',
        "path,caption,offset",
        'a.wav,"one, two",0',
        "path\tcaption",
    ]
    words = ["path", "caption", "a.wav", "nan", "null", '"offset"', "1e999", "\r", "\u2028"]
    rows = changed({"path": "a.wav", "caption": "x", "offset": 0.5, "duration": 1}).map(as_json)
    names = st.sampled_from(["m.jsonl", "m.csv", "m.tsv", "m.json", "m.jsonl.gz", "p.txt"])
    return st.tuples(names, lines(good, words) | rows)


def _sidecars(samples: Samples) -> st.SearchStrategy[bytes]:
    about = changed({"caption": "x", "bpm": 120, "tags": ["a", None], "key": "C"}).map(as_json)
    return about | st.binary(max_size=40) | lines(["a slow waltz"], ["{", '"caption"'])


def _indexes(samples: Samples) -> st.SearchStrategy[bytes]:
    good = json.loads((samples.shards / "index.json").read_text())
    return changed(good).map(as_json) | damaged(as_json(good))


def _plans(samples: Samples) -> st.SearchStrategy[bytes]:
    def make(path: Path) -> None:
        path.mkdir()
        _read_plan(path, None, samples)

    out = samples.made("planned", make) / "out"
    return st.sampled_from([".plan.json", ".shard-000000.json"]).flatmap(
        lambda name: st.tuples(
            st.just(name), changed(json.loads((out / name).read_text())).map(as_json)
        )
    )


def _configurations(samples: Samples) -> st.SearchStrategy[bytes]:
    good = {"prompt": ["a"], "seed": 3, "format": "flac", "decoding": {"top_p": 0.9, "span_len": 3}}
    text = changed(good).map(as_json)
    words = ["seed", ": ", "- ", "&a ", "*a ", "!!python/object:os.system ", "2001-99-99", "<<: *a"]
    return text | lines(["seed: 3", "decoding:", "  top_p: 0.5", "prompt: [a, b]"], words)


def _sweeps(samples: Samples) -> st.SearchStrategy[bytes]:
    good = {
        "method": "grid",
        "parameters": {"model.span_len": {"values": [1, 3]}, "seed_everything": {"value": 1}},
        "command": ["python", "-m", "magnet_train", "fit", "${args}"],
    }
    return changed(good).map(as_json) | damaged(as_json(good))


def _codec_configs(samples: Samples) -> st.SearchStrategy[bytes]:
    good = json.loads((samples.codec / "config.json").read_text())
    return changed(good).map(as_json) | damaged(as_json(good))


READERS = {
    "shard": Reader(shards, _read_shard),
    "index": Reader(_indexes, _read_index),
    "manifest": Reader(_manifests, _read_manifest),
    "sidecar": Reader(_sidecars, _read_sidecar),
    "audio": Reader(audio, _read_audio),
    "plan": Reader(_plans, _read_plan),
    "configuration": Reader(_configurations, _read_configuration),
    "checkpoint": Reader(checkpoints, _read_checkpoint),
    "release": Reader(releases, _read_release),
    "ratings": Reader(ratings, _read_ratings),
    "sweep": Reader(_sweeps, _read_sweep),
    "codec": Reader(_codec_configs, _read_codec),
    "adapter": Reader(adapters, _read_adapter),
    "text encoder": Reader(_text_encoders, _read_text_encoder),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after this CPU time."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(name: str, samples: Samples, examples: int, seed: int | None = None) -> Counter[str]:
    """Gives a reader many invalid files; counts used and refused files.

    Args:
        name: of the reader.
        samples: good files.
        examples: number of files.
        seed: of the files; without a seed they are always the same.

    Raises:
        Exception: anything other than a one-line UserError; its notes have the file.
    """
    reader, counts = READERS[name], Counter[str]()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.strategy(samples))
    def read(content: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, limited(LONGEST_S):
            try:
                reader.read(Path(folder), content, samples)
                counts["used"] += 1
            except UserError as error:
                assert "\n" not in str(error), error
                counts["refused"] += 1

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        (read if seed is None else hypothesis.seed(seed)(read))()
    return counts
