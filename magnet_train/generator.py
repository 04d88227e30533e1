"""A trained model ready to play: network, codec, text encoder and decoding settings in one object.

`load` takes a release folder, a hub id, a checkpoint or a run folder; `generate` takes captions and gives audio.
The command line, the validation callback and a notebook all go through it.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.assets import demo_path
from magnet_train.codec import Codec, load_codec
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.decoding import DecodingConfig, Step, decode, item_noise
from magnet_train.errors import UserError
from magnet_train.model import Magnet, MagnetConfig

RELEASE_FORMAT = 1


@dataclass(frozen=True)
class Generated:
    """What came out for a batch of captions."""

    codes: Tensor
    """`b k t`."""
    wav: Tensor
    """`b channels samples`, as the codec gave it: not normalised."""
    sample_rate: int
    """Of `wav`, in Hz."""
    order: Tensor
    """`b k t`, the step in its stage at which a frame got its final code; -1 = it was given."""


class Generator:
    """Text to audio with one model; stateless, so that the same call gives the same audio."""

    def __init__(
        self,
        network: Magnet,
        codec: Codec,
        text_encoder: TextEncoder,
        decoding: DecodingConfig,
        crop_s: float,
        about: dict[str, Any] | None = None,
    ):
        """Puts the parts together.

        Args:
            network: in evaluation or training mode alike; it has no dropout.
            codec: whose codes the network was trained on.
            text_encoder: whose states it was trained on.
            decoding: used unless a call brings its own.
            crop_s: length of the crops it was trained on, in seconds; the default duration.
            about: provenance, kept in a release.

        Raises:
            UserError: if codec or text encoder do not fit the network.
        """
        facts, config = codec.facts, network.config
        if (facts.num_codebooks, facts.codebook_size) != (config.num_codebooks, config.codebook_size):
            raise UserError(
                f"codec {facts.id!r} has {facts.num_codebooks} codebooks of {facts.codebook_size} entries, the network "
                f"{config.num_codebooks} of {config.codebook_size}: use the codec it was trained with"
            )
        if text_encoder.dim != config.text_dim:
            raise UserError(
                f"text encoder {text_encoder.id!r} is {text_encoder.dim} wide, the network expects {config.text_dim}: "
                "use the encoder it was trained with"
            )
        self.network, self.codec, self.text_encoder = network, codec, text_encoder
        self.decoding, self.crop_s, self.about = decoding, crop_s, about or {}

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.network.head.device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        items: Sequence[str] | None = None,
        duration_s: float | None = None,
        decoding: DecodingConfig | None = None,
        prompt_codes: Tensor | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Generated:
        """One piece of audio for each caption; "" generates without text.

        Args:
            prompts: captions.
            seed: of the noise; each item's depends on (seed, its id) alone, not on its neighbours.
            items: ids, as many as prompts; the captions themselves if None.
            duration_s: length in seconds; the trained length if None.
            decoding: instead of the model's own.
            prompt_codes: `b k t`, beginning that is continued and stays as it is.
            on_step: told of every pass.

        Raises:
            UserError: if the length is not positive or shorter than the prompt, or the prompt does not fit.
        """
        config, facts = decoding or self.decoding, self.codec.facts
        duration_s = self.crop_s if duration_s is None else duration_s
        num_frames = round(duration_s * facts.frame_rate)
        if num_frames < 1:
            raise UserError(f"duration_s={duration_s} is shorter than one frame of {1 / facts.frame_rate} s")
        codes = torch.zeros(len(prompts), facts.num_codebooks, num_frames, dtype=torch.long, device=self.device)
        fixed = torch.zeros(len(prompts), num_frames, dtype=torch.bool, device=self.device)
        if prompt_codes is not None:
            given = prompt_codes.shape[2]
            if given > num_frames or prompt_codes.shape[:2] != codes.shape[:2]:
                raise UserError(
                    f"prompt codes {tuple(prompt_codes.shape)} do not fit {tuple(codes.shape)}: give one for each "
                    "caption, no longer than the duration"
                )
            codes[:, :, :given], fixed[:, :given] = prompt_codes.to(self.device), True
        order = torch.full(codes.shape, -1, dtype=torch.int16, device=self.device)

        def record(step: Step) -> None:
            order[:, step.stage].masked_fill_(step.masked, step.step)
            if on_step is not None:
                on_step(step)

        steps = config.steps_of(facts.num_codebooks)
        noise = item_noise(seed, items if items is not None else prompts, sum(steps), num_frames).to(self.device)
        if any(p.strip() for p in prompts):
            # Keys and values of the text once per generation, not once per pass.
            text = self.network.remember(*(x.to(self.device) for x in self.text_encoder(list(prompts))))
            if config.reference_compat:  # there, a caption's padding takes its share of the attention
                text = replace(text, allowed=text.allowed.any(1)[:, None].expand_as(text.allowed))
            unconditional = self._without_text
        else:
            text, unconditional = None, None

        def with_text(codes: Tensor, stage: int) -> Tensor:
            return self.network(codes, stage, text)

        codes = decode(with_text, unconditional, codes, fixed, facts.codebook_size, config, noise, record)
        # One by one: the codec's rounding may depend on the batch, and a listener's file should not.
        wav = torch.cat([self.codec.decode(row[None]) for row in codes])
        return Generated(codes, wav, facts.sample_rate, order)

    def _without_text(self, codes: Tensor, stage: int) -> Tensor:
        """The null condition, whose cross-attention is exactly zero and therefore not computed."""
        return self.network(codes, stage, None)

    def save(self, folder: Path, card: str) -> None:
        """Write a release: config.json, model.safetensors, README.md, each aside and then moved into place."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": RELEASE_FORMAT,
            "network": self.network.config.to_dict(),
            "codec": self.codec.facts.to_dict(),
            "text_encoder": {"id": self.text_encoder.id, "dim": self.text_encoder.dim},
            "decoding": asdict(self.decoding),
            "crop_s": self.crop_s,
            "about": self.about,
        }
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md.tmp").write_text(card)
        for name in ("model.safetensors", "config.json", "README.md"):
            os.replace(folder / f"{name}.tmp", folder / name)


def load(path: str | Path = "demo", device: str | torch.device = "cpu") -> Generator:
    """A model from a release folder, a hub id, a Lightning checkpoint, or a run folder (its newest checkpoint).

    Args:
        path: "demo" for the shipped model.
        device: where it shall run.

    Raises:
        UserError: if nothing usable is there; the message names the file.
    """
    source = demo_path("magnet") if str(path) == "demo" else Path(path).expanduser()
    if source.is_dir() and (source / "config.json").is_file():
        generator = _load_release(source)
    elif source.is_file():
        generator = _load_checkpoint(source)
    elif source.is_dir():
        generator = _load_checkpoint(newest_checkpoint(source))
    else:
        generator = _load_release(_from_hub(str(path)))
    generator.network.to(device).eval()
    generator.codec.to(device)
    generator.text_encoder.to(device)
    return generator


def newest_checkpoint(run: Path) -> Path:
    """The run folder's `last.ckpt`, else the newest .ckpt below it.

    Raises:
        UserError: if there is none.
    """
    found = sorted(run.rglob("*.ckpt"), key=lambda p: (p.stem == "last", p.stat().st_mtime))
    if not found:
        raise UserError(
            f"{run}: no config.json and no .ckpt in it; give a release folder, a checkpoint or a run folder"
        )
    return found[-1]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"checkpoint {name!r}: no such file or folder")
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "README.md"]))
    except Exception as error:  # a dozen kinds, from no network to no such repository
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {name!r}: no local path, and not to be had from the hub ({reason})") from error


def _load_release(folder: Path) -> Generator:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    try:
        config = json.loads(config_file.read_text())
        if config["format"] != RELEASE_FORMAT:
            raise UserError(f"{config_file}: format {config['format']}, this version reads {RELEASE_FORMAT}; update it")
        network = Magnet(MagnetConfig(**config["network"]))
        decoding = DecodingConfig.from_dict(config["decoding"])
        codec_name, text_name, crop_s = config["codec"]["id"], config["text_encoder"]["id"], config["crop_s"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{config_file}: not a release of magnet_train ({type(error).__name__}: {error})") from error
    try:
        weights = {k: v.float() for k, v in load_file(weights_file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights_file}: missing or broken ({error}); copy or download it again") from error
    _load_weights(network, weights, weights_file)
    codec = load_codec(codec_name)
    if codec.facts.hash != config["codec"]["hash"]:
        raise UserError(
            f"{folder}: trained on codec {config['codec']['hash']}, but {codec_name!r} is {codec.facts.hash}; "
            "its codes would mean something else"
        )
    return Generator(network, codec, load_text_encoder(text_name), decoding, crop_s, config.get("about"))


def _load_checkpoint(path: Path) -> Generator:
    checkpoint = read_checkpoint(path)
    try:
        hparams = checkpoint["hyper_parameters"]
        network = Magnet(MagnetConfig(**hparams["network"]))
        # With weight averaging on, `state_dict` holds the averaged weights, the ones that validation saw.
        weights = {k[8:]: v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
        names = hparams["codec"], hparams["text_encoder"], hparams["span_len"], hparams["crop_s"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of magnet_train (no {error})") from error
    _load_weights(network, weights, path)
    codec_name, text_name, span_len, crop_s = names
    about = {"checkpoint": path.name, "step": checkpoint.get("global_step")}
    decoding = DecodingConfig(span_len=span_len)
    return Generator(network, load_codec(codec_name), load_text_encoder(text_name), decoding, crop_s, about)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint's content; nothing in it is executed.

    Raises:
        UserError: if it is missing, truncated, or holds more than plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # zip, pickle and runtime errors, by where the file is broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: unreadable checkpoint ({reason[:120]}); use an older one") from error


def _load_weights(network: Magnet, weights: dict[str, Tensor], source: Path) -> None:
    own = network.state_dict()
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has the unknown", weights.keys() - own.keys())):
        if keys:
            raise UserError(f"{source}: {problem} {min(keys)} and {len(keys) - 1} more; it belongs to another model")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise UserError(f"{source}: {key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}")
    network.load_state_dict(weights)
