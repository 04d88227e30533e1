"""LAION's CLAP: embeds audio and captions as unit vectors, whose cosine is the CLAP score.

Wu et al., "Large-scale contrastive language-audio pretraining", ICASSP 2023. Published scores use
the checkpoint `music_audioset_epoch_15_esc_90.14.pt`; it runs here in transformers' ClapModel, with
renamed tensors. The models on the hub under transformers' names are different and give different
scores.

Shapes: t samples, n captions.
"""

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from magnet_train.common.downloads import CLAP_MUSIC, WeightsFile, find_weights, load_tensors
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import load_pretrained, one_line
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports
from magnet_train.metrics.networks.frontend import check_clip

SAMPLE_RATE = 48_000
WINDOW = 10 * SAMPLE_RATE
"""Input length in samples."""
MAX_TOKENS = 77
"""Maximum number of tokens of a caption, including start and end; longer ones are truncated."""

CONFIG: dict[str, Any] = {
    # RoBERTa's own epsilon; ClapTextConfig's default is another.
    "text_config": {"layer_norm_eps": 1e-5},
    "audio_config": {
        "depths": [2, 2, 12, 2],
        "num_attention_heads": [4, 8, 16, 32],
        "patch_embeds_hidden_size": 128,
        "hidden_size": 1024,
        "enable_fusion": False,
    },
    "projection_dim": 512,
}
"""ClapConfig of LAION's HTSAT-base with RoBERTa-base, without fusion; other values are defaults."""

FEATURES: dict[str, Any] = {
    "sampling_rate": SAMPLE_RATE,
    "feature_size": 64,
    "fft_window_size": 1024,
    "hop_length": 480,
    "frequency_min": 50,
    "frequency_max": 14_000,
    "truncation": "rand_trunc",
    "padding": "repeatpad",
}
"""Settings of ClapFeatureExtractor that match LAION; its defaults differ by up to 67 dB."""

_RENAMED = {
    "text_branch.": [(r"^text_branch\.", "text_model.")],
    "audio_branch.": [
        (r"^audio_branch\.", "audio_model.audio_encoder."),
        (r"\.bn0\.", ".batch_norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ],
    "": [
        (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
        (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
    ],
}
_COMPUTED = ("position_ids", "token_type_ids", "relative_position_index")
"""Buffers that ClapModel computes from its configuration."""
_UNRELATED = ("a slow waltz for solo piano", "a dog barks at a passing train")


def ten_seconds(wav: Tensor, key: str = "") -> Tensor:
    """The network's input: 480,000 samples of a mono clip `t` at 48 kHz.

    Shorter clips are repeated and padded with zeros; longer ones are cropped. LAION draws the crop
    at random in every call; here it is a function of the key.
    """
    if len(wav) > WINDOW:
        digest = hashlib.sha256(f"0/{key}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % (len(wav) - WINDOW + 1)
        return wav[start : start + WINDOW]
    repeated = wav.repeat(WINDOW // len(wav))
    return torch.nn.functional.pad(repeated, (0, WINDOW - len(repeated)))


def transformers_name(name: str) -> str:
    """Convert a tensor name of LAION to transformers' ClapModel, except for the packed `qkv`.

    >>> transformers_name("audio_branch.layers.2.blocks.0.attn.proj.weight")
    'audio_model.audio_encoder.layers.2.blocks.0.attention.output.dense.weight'
    """
    branch = next(branch for branch in _RENAMED if name.startswith(branch))
    for pattern, replacement in _RENAMED[branch]:
        name = re.sub(pattern, replacement, name)
    return name


def to_transformers(state: Mapping[str, Tensor], needed: Container[str]) -> dict[str, Tensor]:
    """LAION's tensors under transformers' names, without those that are not `needed`.

    In the published checkpoint, these are STFT and mel layers, classifier heads, two transforms of
    training, attention masks, and indices that ClapModel computes.
    """
    renamed: dict[str, Tensor] = {}
    for laion_name, tensor in state.items():
        name = transformers_name(laion_name)
        pieces = {name: tensor}
        if name.endswith((".attention.self.qkv.weight", ".attention.self.qkv.bias")):
            thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            pieces = {name.replace(".qkv.", f".{part}."): third for part, third in thirds}
        if all(piece in needed for piece in pieces):
            renamed |= pieces
    return renamed


class Clap:
    """LAION's checkpoint in transformers' ClapModel."""

    id = "clap-music"
    sample_rate = SAMPLE_RATE
    min_duration_s = 1 / SAMPLE_RATE

    def __init__(self, model: Any, tokenizer: Any, hash: str):
        """
        Args:
            model: A ClapModel.
            tokenizer: RoBERTa's.
            hash: Hash of the weights.
        """
        from transformers import ClapFeatureExtractor

        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.hash = hash
        self.features = ClapFeatureExtractor(**FEATURES)

    @torch.no_grad()
    def embed_audio(self, wav: Tensor, key: str = "") -> Tensor:
        """A mono clip at 48 kHz, `t` -> unit vector, `512`; clips above 10 s are cropped.

        Args:
            wav: not empty; silence is allowed.
            key: id of the clip, so that its crop is always the same.

        Raises:
            UserError: if the clip is empty, or has NaN or infinite samples.
        """
        if wav.shape == (0,):
            raise UserError(f"an empty clip; {self.id} cannot embed it")
        check_clip(wav, SAMPLE_RATE, self.min_duration_s, self.id)
        crop = ten_seconds(wav.float().cpu(), key).numpy()
        features = self.features(crop, sampling_rate=SAMPLE_RATE, return_tensors="pt")[
            "input_features"
        ]
        return self.model.get_audio_features(features.to(self.model.device)).pooler_output[0].cpu()

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions, without a template -> unit vectors, `n 512`."""
        # Always padded to 77 tokens, so that a vector does not depend on the other captions.
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.model.device)
        return self.model.get_text_features(
            tokens["input_ids"], tokens["attention_mask"]
        ).pooler_output.cpu()


class LaionClap:
    """The package `laion-clap` with the same interface. Not tested: it could not be imported."""

    id = "laion-clap-music"
    sample_rate = SAMPLE_RATE
    min_duration_s = 1 / SAMPLE_RATE

    def __init__(self, file: WeightsFile, device: str = "cpu"):
        """
        Raises:
            UserError: if the package cannot be imported.
        """
        try:
            from laion_clap import CLAP_Module  # type: ignore[import-not-found]
        except Exception as error:  # a torchvision for another torch raises OSError, RuntimeError
            raise UserError(
                f"laion-clap cannot be imported ({one_line(error)}): pip install "
                "-e '.[laion-clap]', or use clap: transformers computes the same from the "
                "same weights"
            ) from error
        self.hash = file.hash
        self.model = CLAP_Module(enable_fusion=False, amodel="HTSAT-base", device=device)
        state = _state(file)
        # transformers has computed it since 4.31
        state.pop("text_branch.embeddings.position_ids", None)
        self.model.model.load_state_dict(state)
        self.model.eval()

    @torch.no_grad()
    def embed_audio(self, wav: Tensor, key: str = "") -> Tensor:
        """As Clap's."""
        if wav.shape == (0,):
            raise UserError(f"an empty clip; {self.id} cannot embed it")
        check_clip(wav, SAMPLE_RATE, self.min_duration_s, self.id)
        crop = ten_seconds(wav.float(), key)
        return self.model.get_audio_embedding_from_data([crop], use_tensor=True)[0].cpu()

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """As Clap's."""
        return self.model.get_text_embedding(list(captions), use_tensor=True).cpu()


@lru_cache
def load_clap(
    path: str | None = None,
    tokenizer: str = "roberta-base",
    package: bool = False,
    device: str = "cpu",
) -> Clap | LaionClap:
    """Load the published CLAP in evaluation mode.

    Args:
        path: `music_audioset_epoch_15_esc_90.14.pt` (default: cached or downloaded).
        tokenizer: folder or hub id of RoBERTa's tokenizer.
        package: use the package `laion-clap` instead of transformers.
        device: device of the network.

    Raises:
        UserError: if the weights or the tokenizer cannot be found, or have another hash.
    """
    file = find_weights(CLAP_MUSIC, path)
    clap = LaionClap(file, device) if package else make_clap(file, CONFIG, tokenizer, device)
    check_captions(clap)
    return clap


def make_clap(
    file: WeightsFile, config: Mapping[str, Any], tokenizer: str, device: str = "cpu"
) -> Clap:
    """Load a checkpoint of LAION into a ClapModel with this configuration.

    Raises:
        UserError: if a tensor is missing, unexpected or of another shape, or the tokenizer does not
            match.
    """
    ensure_torchaudio_imports()  # before anything imports transformers
    from transformers import ClapConfig, ClapModel

    model: Any = ClapModel(ClapConfig(**config))
    needed = [name for name in model.state_dict() if not name.endswith(_COMPUTED)]
    renamed = to_transformers(_state(file), set(needed))
    if missing := [name for name in needed if name not in renamed]:
        raise UserError(
            f"{file.path}: not CLAP of the expected kind (HTSAT-base with RoBERTa, no fusion); "
            f"missing tensors: {len(missing)}, such as {missing[0]}"
        )
    try:
        model.load_state_dict(renamed, strict=False)  # not strict for what is computed
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{file.path}: not CLAP of the expected kind: {' '.join(str(error).split())[:300]}"
        ) from error
    words = load_tokenizer(tokenizer, model.config.text_config.vocab_size)
    return Clap(model.to(device), words, file.hash)


def load_tokenizer(name: str, vocab_size: int) -> Any:
    """Load RoBERTa's tokenizer from a folder or hub id, and check its vocabulary.

    Raises:
        UserError: if it cannot be loaded or has another vocabulary.
    """
    ensure_torchaudio_imports()
    from transformers import AutoTokenizer

    def load(source: str, local: bool) -> Any:
        return AutoTokenizer.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )

    tokenizer = load_pretrained(
        "CLAP tokenizer", name, load, ("config.json", "tokenizer_config.json")
    )
    # transformers may silently create an empty tokenizer if the vocabulary is missing.
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"CLAP tokenizer {name!r}: {len(tokenizer)} tokens instead of {vocab_size}; give "
            "roberta-base with its vocabulary"
        )
    return tokenizer


def check_captions(clap: Clap | LaionClap) -> None:
    """Check that the vectors of two unrelated captions differ, to detect damaged text weights.

    Raises:
        UserError: if their cosine is 0.9 or more, or not a number.
    """
    first, second = clap.embed_text(_UNRELATED)
    cosine = float(first @ second)
    if not cosine < 0.9:
        raise UserError(
            f"{clap.id}: two unrelated captions have cosine {cosine:.3f}, which should be far "
            "below 0.9; the text weights or the tokenizer are broken"
        )


def _state(file: WeightsFile) -> dict[str, Tensor]:
    """The network's tensors in a training checkpoint of LAION.

    Raises:
        UserError: if it is not such a checkpoint.
    """
    content = load_tensors(file)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(
            f"{file.path}: not a training checkpoint of LAION: has more than named tensors"
        )
    return {name.removeprefix("module."): x for name, x in state.items()}  # what several GPUs left
