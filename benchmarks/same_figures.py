"""Every metric on 1, 2 and 3 processes, with an empty rank, a padding sampler, and in batches of 1,
4 and 7.

    python benchmarks/same_figures.py --out benchmarks/records/same_figures.md
 The shipped model decodes 14 captions of the validation split (3.2 s each), dealt out to real gloo
processes, each of which always decodes full batches; the features are gathered by id and scored as
validation does it. The table has each figure in each case, and below how many codes differ from
those of one process in batches of 4.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from magnet_train.common.assets import demo_path
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.generator import load
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.scoring import METRICS, FeatureSet, score

NUM_PROMPTS, SECONDS = 14, 3.2
CASES: dict[str, tuple[int, list[slice | list[int]]]] = {
    "1 process": (4, [slice(None)]),
    "2 processes": (4, [slice(0, None, 2), slice(1, None, 2)]),
    "3 processes": (4, [slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)]),
    "empty rank": (4, [slice(0, 9), slice(0, 0), slice(9, None)]),
    "padding sampler": (4, [slice(0, None, 3), slice(1, None, 3), [2, 5, 8, 11, 0]]),
    "batch 1": (1, [slice(None)]),
    "batch 7": (7, [slice(None)]),
}


def items() -> list[tuple[str, str, dict]]:
    """Key, caption and the stored reference, of the first captions of the validation split."""
    found = []
    for batch in EvaluationDataset(ShardSet.open(demo_path("shards/validation")), 500, 8):
        found += list(zip(batch["keys"], batch["captions"], batch["references"], strict=True))
    return found[:NUM_PROMPTS]


def rank_of(rank: int, case: str, folder: str) -> None:
    """Decodes and embeds a rank's share, gathers, and writes every figure and code."""
    torch.set_num_threads(1)
    batch_size, shares = CASES[case]
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=len(shares))
    everything, share = items(), shares[rank]
    own = everything[share] if isinstance(share, slice) else [everything[i] for i in share]
    generator = load()
    embedder = load_embedder("musicnn")
    decoding = replace(generator.decoding, decoding_steps=(6, 2, 2, 2))
    features = FeatureSet(embedder)
    real = FeatureSet(embedder)
    codes = {}
    references = {key: reference for key, _, reference in own}
    own_captions = {key: caption for key, caption, _ in own}
    for item in generator.decode_items(own_captions, batch_size, 0, decoding, SECONDS):
        features.add(item.key, item.wav, item.sample_rate)
        real.embeddings[item.key] = references[item.key]["embeddings"]
        real.outputs[item.key] = references[item.key]["tags"]
        codes[item.key] = item.codes
    features = features.all_gather()
    statistics = real.all_gather().statistics()
    captions = {key: caption for key, caption, _ in everything}
    figures = {
        name: score(f"{name}/musicnn", features, statistics, captions, system="").value
        for name in METRICS
    }
    torch.save({"figures": figures, "codes": codes}, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the table.")
    args = parser.parse_args()
    columns, codes = {}, {}
    for case, (_, shares) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(rank_of, (case, folder), nprocs=len(shares), start_method="spawn")
            parts = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(len(shares))]
        assert all(part["figures"] == parts[0]["figures"] for part in parts), (
            f"{case}: ranks disagree"
        )
        columns[case] = parts[0]["figures"]
        codes[case] = {key: value for part in parts for key, value in part["codes"].items()}
        print(case, columns[case], flush=True)
    first = codes["1 process"]
    differing = {
        case: sum(int((own[key] != first[key]).sum()) for key in first)
        for case, own in codes.items()
    }
    total = sum(x.numel() for x in first.values())
    lines = [f"| metric (musicnn) | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {k} | {' | '.join(f'{c[k]:.8g}' for c in columns.values())} |" for k in METRICS]
    counts = " | ".join(str(differing[case]) for case in columns)
    lines += [f"| codes that differ, of {total:,} | {counts} |"]
    text = f"# Figures on any number of processes\n\n{__doc__}\n" + "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
