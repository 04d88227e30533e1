"""Writes tiny published-format components with transformers: EnCodec in its 32 kHz configuration,
and T5.

The files have the published format; only the widths are small and the weights random.

    python tests/make_components.py FOLDER     # makes FOLDER/encodec and FOLDER/t5
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

ensure_torchaudio_imports()  # before anything imports transformers

CORPUS = [
    "a slow chorale for string quartet in G minor",
    "a fast reel on the flute with guitar at 120 beats per minute",
    "solo piano, a waltz by an unknown composer in D major",
    "a dog barks while drums and organ play a quiet hymn",
    "the quick brown fox jumps over the lazy dog 0123456789",
]


def make_codec(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A narrow EncodecModel as `facebook/encodec_32khz` configures it: 50 Hz, 4 codebooks of 2048.

    A fresh model's codebooks are zero, so they are filled with the latents of noise at falling
    scale: each code is then near some input, and many entries are in use.

    Args:
        folder: Where `save_pretrained` writes; made if absent.
        seed: Of the weights.
        changes: Changed fields of EncodecConfig.
    """
    from transformers import EncodecConfig, EncodecModel

    from magnet_train.checks.bench_data import ENCODEC_32KHZ

    settings = ENCODEC_32KHZ | {"num_filters": 4} | changes  # 64 as published
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = EncodecModel(EncodecConfig(**settings)).eval()
        config = model.config
        noise = torch.randn(1, config.audio_channels, config.codebook_size // 4 * config.hop_length)
        noise = noise * torch.linspace(0, 1, noise.shape[-1])
        residual = model.encoder(noise)[0].T
        for layer in model.quantizer.layers:
            embed = layer.codebook.embed
            picked = residual[torch.randint(len(residual), (len(embed),))]
            embed.copy_(picked + 0.1 * residual.std() * torch.randn_like(embed))
            residual = residual - embed[torch.cdist(residual, embed).argmin(1)]
    model.save_pretrained(folder)
    return model


def make_tokenizer(folder: Path, with_vocabulary: bool = True) -> int:
    """A T5 tokenizer trained in-process, saved as `tokenizer.json`; returns its number of tokens.

    Args:
        folder: Where `save_pretrained` writes; made if absent.
        with_vocabulary: False writes only the settings file, like an incomplete copy.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    learner.train_from_iterator(CORPUS, trainer)
    pieces = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=pieces, model_max_length=512)
    tokenizer.save_pretrained(folder)
    if not with_vocabulary:
        (folder / "tokenizer.json").unlink()
    return len(tokenizer)


def make_t5(folder: Path, seed: int = 0, with_vocabulary: bool = True, dim: int = 32) -> None:
    """A tiny T5, encoder and decoder as published, with its tokenizer.

    Args:
        folder: Where `save_pretrained` writes; made if absent.
        seed: Of the weights.
        with_vocabulary: As in `make_tokenizer`.
        dim: Width of the states.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    size = make_tokenizer(folder, with_vocabulary)
    settings: dict[str, Any] = {
        "vocab_size": -(-size // 32)
        * 32,  # published T5 models pad their embeddings too: 32128 for 32100 tokens
        "d_model": dim,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(T5Config(**settings)).save_pretrained(folder)


def make_musicgen(folder: Path, seed: int = 0, dim: int = 32, **decoder: Any) -> Any:
    """A narrow MusicGen as `facebook/musicgen-small` is laid out, with its tokenizer.

    Args:
        folder: Where `save_pretrained` writes; made if absent.
        seed: Of the weights.
        dim: Width of the text encoder's states and of the decoder's layers.
        decoder: Changed fields of MusicgenDecoderConfig.
    """
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    make_t5(folder / "t5", seed, dim=dim)
    codec = make_codec(folder / "codec", seed)
    make_tokenizer(folder)
    settings: dict[str, Any] = {
        "hidden_size": 2 * dim,
        "ffn_dim": 8 * dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_codebooks": 4,
        "vocab_size": 2048,
    }
    settings |= decoder
    settings |= dict.fromkeys(("pad_token_id", "bos_token_id"), settings["vocab_size"])
    config = MusicgenConfig(
        text_encoder=T5Config.from_pretrained(folder / "t5").to_dict(),
        audio_encoder=EncodecConfig.from_pretrained(folder / "codec").to_dict(),
        decoder=MusicgenDecoderConfig(**settings).to_dict(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicgenForConditionalGeneration(config).eval()
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.1) if weight.dim() > 1 else None
    model.audio_encoder.load_state_dict(codec.state_dict())
    model.save_pretrained(folder)
    return model


def make_roberta_tokenizer(folder: Path, size: int = 300) -> int:
    """A RoBERTa tokenizer trained in-process, saved as `tokenizer.json`; returns its number of
    tokens.

    Args:
        folder: Where `save_pretrained` writes; made if absent.
        size: Tokens wanted: 256 bytes, 5 marks, and merges.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = RobertaTokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]]
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    make_codec(Path(sys.argv[1]) / "encodec")
    make_t5(Path(sys.argv[1]) / "t5")
