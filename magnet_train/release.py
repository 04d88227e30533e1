"""What was trained, as it lies on disk: releases, checkpoints and run folders are read here, and releases written.

A release is `config.json`, `model.safetensors` and `README.md`, and `codec/` where the codec came with the model. It
is read in two steps, settings before weights, so that a mistake shows before gigabytes are loaded.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.codec.base import CodecFacts, load_codec, split_name
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import one_line
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import Magnet, MagnetConfig

RELEASE_FORMAT = 1
IN_RELEASE = "./"  # a codec's id that begins so lies in the release's own folder
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A trained model's settings, and where its weights are."""

    file: Path
    """`model.safetensors` or a Lightning checkpoint."""
    network: MagnetConfig
    codec: dict[str, Any]
    """`id`, which `load_codec` takes, and all of `CodecFacts` where they are known."""
    text_encoder: str
    """What `load_text_encoder` takes."""
    crop_s: float
    """Length that it was trained on, in seconds."""
    decoding: DecodingConfig
    """Used unless a call brings its own; holds the span length of the training."""
    guidance_dropout: float = 0.3
    """Share of examples that were trained without their caption."""
    about: dict[str, Any] = field(default_factory=dict)
    """Provenance: `licence`, `source`, `step`, `metrics` … as far as known."""

    @classmethod
    def open(cls, path: str | Path) -> "Trained":
        """From a release folder, a hub id, a Lightning checkpoint, a run folder (its newest checkpoint), or "demo".

        Raises:
            UserError: if nothing usable is there; the message names the file.
        """
        source = demo_path("magnet") if str(path) == "demo" else Path(path).expanduser()
        if source.is_dir() and (source / "config.json").is_file():
            return _open_release(source)
        if source.is_file():
            return _open_checkpoint(source)
        if source.is_dir():
            if (source / "state_dict.bin").is_file():
                raise UserError(f"{source}: a model of audiocraft; first: magnet_train convert {source} --out FOLDER")
            return _open_checkpoint(newest_checkpoint(source))
        return _open_release(_from_hub(str(path)))

    def weights(self) -> dict[str, Tensor]:
        """By the network's names, in the precision in which they are stored, checked against its shapes.

        Raises:
            UserError: if the file is broken, or its weights belong to another model.
        """
        if self.file.suffix == ".safetensors":
            weights = _read_safetensors(self.file)
        else:  # with weight averaging on, `state_dict` holds the averaged weights, the ones that validation saw
            state = read_checkpoint(self.file)["state_dict"]
            weights = {k[8:]: v for k, v in state.items() if k.startswith("network.")}
        check_weights(weights, self.network, self.file)
        return weights

    def build(self) -> Magnet:
        """The network with its weights, in float32; takes no more memory than these."""
        with torch.device("meta"):
            network = Magnet(self.network)
        network.load_state_dict({k: v.float() for k, v in self.weights().items()}, assign=True)
        return network

    def to_dict(self) -> dict[str, Any]:
        """`config.json` of a release."""
        return {
            "format": RELEASE_FORMAT,
            "network": self.network.to_dict(),
            "codec": self.codec,
            "text_encoder": {"id": self.text_encoder, "dim": self.network.text_dim},
            "decoding": asdict(self.decoding),
            "crop_s": self.crop_s,
            "guidance_dropout": self.guidance_dropout,
            "about": self.about,
        }


# --- read ---------------------------------------------------------------------------------------------------------


def _open_release(folder: Path) -> Trained:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if config["format"] != RELEASE_FORMAT:
            raise UserError(f"{file}: format {config['format']}, this version reads {RELEASE_FORMAT}; update it")
        network, codec = MagnetConfig(**config["network"]), dict(config["codec"])
        if not re.fullmatch(r"demo|encodec_\w+|\./codec|\w[\w.-]*/\w[\w.-]*", re.sub(r"@\d+$", "", codec["id"])):
            raise UserError(
                f"{file}: names codec {codec['id']!r}, which is neither its own ./codec nor a hub id; refused"
            )
        if codec["id"].startswith(IN_RELEASE):
            codec["id"] = str(folder.resolve() / codec["id"].removeprefix(IN_RELEASE))
        if config["text_encoder"]["dim"] != network.text_dim:
            raise UserError(
                f"{file}: text encoder {config['text_encoder']['id']!r} is {config['text_encoder']['dim']} wide, the "
                f"network expects {network.text_dim}; copy the release again"
            )
        about = config.get("about", {})
        if not isinstance(about, dict):
            raise TypeError("about is no object")
        return Trained(
            folder / "model.safetensors", network, codec, config["text_encoder"]["id"], float(config["crop_s"]),
            DecodingConfig.from_dict(config["decoding"]), config.get("guidance_dropout", 0.3), about,
        )  # fmt: skip
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: not a release of magnet_train ({type(error).__name__}: {error})") from error


def _open_checkpoint(path: Path) -> Trained:
    checkpoint = read_checkpoint(path)
    try:
        given = checkpoint["hyper_parameters"]
        about = {"checkpoint": path.name, "step": checkpoint.get("global_step")} | checkpoint.get("begun_with", {})
        # As the last validation decoded.
        kept = [v for k, v in checkpoint.get("callbacks", {}).items() if k.startswith("GenerationCallback")]
        decoding = (kept[0]["decoding"] if kept else {}) | {"span_len": given["span_len"]}
        return Trained(
            path, MagnetConfig(**given["network"]), {"id": given["codec"]}, given["text_encoder"], given["crop_s"],
            DecodingConfig.from_dict(decoding), given["guidance_dropout"],
            {k: v for k, v in about.items() if v is not None},
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of magnet_train (no {error})") from error


def newest_checkpoint(run: Path) -> Path:
    """The run's `last.ckpt`, else its newest .ckpt, else the newest below its folder.

    Raises:
        UserError: if there is none.
    """
    own = [*run.glob("*.ckpt"), *(run / "checkpoints").glob("*.ckpt")]  # not those of a run in a folder within
    found = sorted(own or run.rglob("*.ckpt"), key=lambda p: (p.stem.startswith("last"), p.stat().st_mtime))
    if not found:
        raise UserError(
            f"{run}: no config.json and no .ckpt in it; give a release folder, a checkpoint or a run folder"
        )
    return found[-1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint's content; nothing in it is executed, and tensors stay in the file until they are used.

    Raises:
        UserError: if it is missing, truncated, or holds more than plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # zip, pickle and runtime errors, by where the file is broken
        reason = one_line(error, 200).partition(". ")[0]  # what follows is advice on torch
        raise UserError(f"{path}: unreadable checkpoint ({reason}); use an older one") from error


def check_weights(weights: Mapping[str, Tensor], config: MagnetConfig, source: Path) -> None:
    """Whether names and shapes are those of a network of that configuration.

    Raises:
        UserError: that names the first that is not.
    """
    with torch.device("meta"):
        own = Magnet(config).state_dict()
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has the unknown", weights.keys() - own.keys())):
        if keys:
            raise UserError(f"{source}: {problem} {min(keys)} and {len(keys) - 1} more; it belongs to another model")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{source}: {key} is {tuple(value.shape)}, the configuration asks for {tuple(own[key].shape)}; "
                "it belongs to another model"
            )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: missing or broken ({error}); copy or download it again") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"checkpoint {name!r}: no such file or folder")
    patterns = ["config.json", "model.safetensors", "README.md", "codec/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # a dozen kinds, from no network to no such repository
        reason = one_line(error)
        raise UserError(f"checkpoint {name!r}: no local path, and not to be had from the hub ({reason})") from error


# --- write --------------------------------------------------------------------------------------------------------


def check_new(out: Path) -> Path:
    """`out` as a whole path, before work begins that it would lose.

    Raises:
        UserError: if it holds anything already, or cannot be made.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
        os.rmdir(probe)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out` once all is written; if anything fails, nothing stays behind.

    Raises:
        UserError: if `out` holds anything already, or cannot be made.
        OSError: if the disk is full.
    """
    out = check_new(out)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp keeps others out
        os.replace(aside, out)
    except (shutil.Error, RuntimeError) as error:  # what copies and torch.save make of it
        if shutil.disk_usage(aside).free < 2**20:
            raise OSError(errno.ENOSPC, "no space left", str(out)) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_release(
    out: Path, trained: Trained, tensors: Mapping[str, Callable[[], Tensor]], text: str | None = None
) -> Trained:
    """Write a release folder, whole or not at all, one tensor after another; returns it as it lies there.

    A codec that lies in a folder goes along, so that the release is complete wherever it is copied to; it must be the
    one that `trained` is stamped with.

    Args:
        out: must not exist, or be empty.
        trained: its settings; `file` is not read.
        tensors: by the network's names, each made when it is written.
        text: README.md; `card` makes it if None.

    Raises:
        UserError: if `out` holds anything, or the codec is another than the stamp says.
    """
    with new_folder(out) as folder:
        name, first = split_name(trained.codec["id"])
        source = Path(name)
        if source.is_absolute() and source.is_dir():  # as `load_codec` names folders
            check_stamp(trained.codec, load_codec(trained.codec["id"]).facts, trained.file)
            (folder / "codec").mkdir()
            for file in sorted(source.iterdir()):  # what a codec consists of, and nothing that lies beside it
                if file.suffix == ".safetensors" or file.name in ("config.json", "audiocraft.yaml", "README.md"):
                    shutil.copy(file, folder / "codec" / file.name)
            at = "" if first is None else f"@{first}"
            trained = replace(trained, codec=trained.codec | {"id": f"{IN_RELEASE}codec{at}"})
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(trained.to_dict(), indent=2) + "\n")
        written = replace(trained, file=folder / "model.safetensors")
        (folder / "README.md").write_text(card(written, out.name) if text is None else text)
    return _open_release(out)


def write_safetensors(path: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """A safetensors file that never has more than one tensor in memory; the library's own writer needs them all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, make in tensors.items():
        tensor = make()
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for make in tensors.values():
            file.write(make().detach().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def card(trained: Trained, name: str) -> str:
    """README.md of a release: what it is, where it comes from, under which licence, and how to use it."""
    about, network = trained.about, trained.network
    licence = about.get("licence")
    head = {"license": licence or "unknown", "library_name": "magnet_train", "pipeline_tag": "text-to-audio"}
    if about.get("base_model"):
        head["base_model"] = about["base_model"]
    lines = [
        "---",
        *(f"{k}: {v}" for k, v in head.items()),
        "tags: [magnet, text-to-audio]",
        "---",
        "",
        f"# {name}",
        "",
    ]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Magnet(network).parameters()) / 1e6
    lines += [
        f"A MAGNeT ([arXiv 2401.04577](https://arxiv.org/abs/2401.04577)) of {parameters:.3g} M parameters: "
        f"{network.num_layers} layers of width {network.dim}, for {trained.crop_s:g} s of audio in "
        f"{network.num_codebooks} codebooks of {network.codebook_size} entries.",
        "",
        "```python",
        "import magnet_train",
        "",
        f'audio = magnet_train.load("{name}").generate(["a slow waltz for piano"], seed=0).wav  # b channels samples',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| licence | {licence or 'not stated'} |",
        *(f"| codec's licence | {v} |" for v in [_licence_of(trained.file.parent / "codec")] if v),
        *(
            f"| {k} | {about[k]} |"
            for k in ("base_model", "source", "checkpoint", "step", "trained_on")
            if about.get(k) is not None
        ),
        f"| codec | {trained.codec['id']}, padding {trained.codec.get('pad_mode', 'as it says')} |",
        f"| text encoder | {trained.text_encoder} |",
        *(f"| {k} | {v} |" for k, v in (about.get("metrics") or {}).items()),
        "",
    ]
    if licence and "nc" in str(licence).lower().split("-"):
        lines += [f"What is derived from these weights stays under {licence}: no commercial use.", ""]
    return "\n".join(lines)


def check_stamp(stamped: dict[str, Any], facts: CodecFacts, where: Path) -> None:
    """Whether a codec is the one that a model was trained with, as far as that was known.

    Raises:
        UserError: if it is another.
    """
    if facts.hash != stamped.get("hash", facts.hash):
        raise UserError(
            f"{where}: trained on codec {stamped['hash']}, but {facts.id!r} is {facts.hash}; "
            "its codes would mean something else"
        )


def codec_facts(codec: dict[str, Any]) -> CodecFacts | None:
    """All facts about the codec, where a release or a converter knew them."""
    try:
        return CodecFacts.from_dict(codec)
    except ValueError:
        return None


def _licence_of(folder: Path) -> str | None:
    """What the front matter of a README.md says."""
    if not (folder / "README.md").is_file():
        return None
    found = re.search(r"^license: *(\S+)", (folder / "README.md").read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else None
