"""Trains the demo's text-audio scorer on original audio and captions of the training split, and on
nothing else.

    python data/demo/train_text_audio.py --audio AUDIO --cache AUDIO/features
 Contrastive, as CLIP: in a batch each clip must find its caption and each caption its clip.
Validation stops it.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from magnet_train.conditioning import load_text_encoder
from magnet_train.metrics.networks.musicnn import load_musicnn
from magnet_train.metrics.networks.text_audio import TextAudioHead, clip_features, sentence_features


def features_of(folder: Path, cache: Path, limit: int | None) -> tuple[Tensor, list[dict]]:
    """Features of a random 10 s of each file (the length that the demo generates), and the files'
    facts.
    """
    musicnn = load_musicnn()
    rows, facts = [], []
    files = sorted(folder.glob("*.flac"), key=lambda p: hashlib.sha256(p.stem.encode()).digest())[
        :limit
    ]
    for path in tqdm(files, desc=folder.name, unit="clip"):
        kept = cache / folder.name / f"{path.stem}.npy"
        if not kept.exists():
            wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            rng = np.random.default_rng(int.from_bytes(path.stem.encode()[-8:], "big"))
            start = int(rng.integers(max(1, len(wav) - 160_000)))
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, clip_features(musicnn(wav[start : start + 160_000])).numpy())
        rows.append(torch.from_numpy(np.load(kept)))
        facts.append(json.loads(path.with_suffix(".json").read_text()))
    return torch.stack(rows), facts


@torch.no_grad()
def retrieval(head: TextAudioHead, audio: Tensor, text: Tensor) -> dict[str, float]:
    """Rank of the right caption for each clip among all of the split; equal captions count as
    right.
    """
    head.eval()
    similarities = head.embed_audio(audio) @ head.embed_text(text).T
    rank = (similarities > similarities.diagonal()[:, None] + 1e-6).sum(1)
    matched = similarities.diagonal().mean()
    others = (similarities.sum() - similarities.diagonal().sum()) / (len(audio) * (len(audio) - 1))
    return {
        **{f"recall_at_{k}": (rank < k).float().mean().item() for k in (1, 5, 10)},
        "matched_minus_others": (matched - others).item(),
        "clips": len(audio),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--audio", type=Path, required=True, help="Folder with train, validation and test folders."
    )
    parser.add_argument("--cache", type=Path, required=True, help="Folder for the clips' features.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "text_audio",
        help="Folder for the weights.",
    )
    parser.add_argument("--limit", type=int, help="Use only so many training clips.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and batches.")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    encoder = load_text_encoder("demo")
    data = {}
    for split in ("train", "validation", "test"):
        audio, facts = features_of(
            args.audio / split, args.cache, args.limit if split == "train" else None
        )
        data[split] = audio, sentence_features(encoder, [f["caption"] for f in facts])
    head = TextAudioHead()
    audio, text = data["train"]
    head.audio_mean.copy_(audio.mean(0))
    head.audio_std.copy_(audio.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    best, best_state, patience = -1.0, None, 0
    for epoch in range(200):
        head.train()
        for batch in torch.randperm(len(audio)).split(128):
            noisy = audio[batch] + 0.1 * head.audio_std * torch.randn_like(audio[batch])
            logits = (
                head.embed_audio(noisy)
                @ head.embed_text(text[batch]).T
                * head.log_scale.exp().clamp(max=50)
            )
            target = torch.arange(len(batch))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = retrieval(head, *data["validation"])
        if found["matched_minus_others"] + found["recall_at_10"] > best:
            best, patience = found["matched_minus_others"] + found["recall_at_10"], 0
            best_state = {k: v.clone() for k, v in head.state_dict().items()} | {}
            best_epoch = epoch
        elif (patience := patience + 1) > 25:
            break
    assert best_state is not None
    head.load_state_dict(best_state)
    report = {split: retrieval(head, *data[split]) for split in ("validation", "test")}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() for k, v in best_state.items()}, args.out / "model.safetensors"
    )
    config = {
        "head": {},
        "trained_on": f"{len(audio)} clips of the training split",
        "epochs": best_epoch + 1,
    }
    (args.out / "config.json").write_text(
        json.dumps(config | {"retrieval": report}, indent=2) + "\n"
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
