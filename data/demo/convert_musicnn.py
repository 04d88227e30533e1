"""Takes musicnn's tagger out of its wheel, without TensorFlow, into `data/demo/musicnn`.

    pip download --no-deps musicnn==0.1.0
    python data/demo/convert_musicnn.py musicnn-0.1.0-py3-none-any.whl
 The wheel holds a TensorFlow checkpoint: an index (a LevelDB table of protocol buffers) that says
where in the data file each tensor lies. Both formats are simple enough to read here; nothing in
them is executed. Adam's slots, two thirds of the file, stay behind; each batch normalisation
becomes a scale and a shift.
"""

import argparse
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = "musicnn/MTT_musicnn/"
BATCH_NORM_EPSILON = 1e-3  # TensorFlow's default
# Our layer: number of its convolution or dense layer, number of the batch normalisation behind it.
LAYERS = {
    "timbral.0": ("conv2d", 1),
    "timbral.1": ("conv2d_1", 2),
    "temporal.0": ("conv2d_2", 3),
    "temporal.1": ("conv2d_3", 4),
    "temporal.2": ("conv2d_4", 5),
    "middle.0": ("conv2d_5", 6),
    "middle.1": ("conv2d_6", 7),
    "middle.2": ("conv2d_7", 8),
    "penultimate": ("dense", 10),
}


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in seven-bit groups, lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def table_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block of a LevelDB table; a key shares its beginning with the one
    before.
    """
    if data[offset + size] != 0:
        raise ValueError("compressed block; musicnn's are not")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    at, end, key = 0, size - 4 * (restarts + 1), b""
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def message(data: bytes) -> dict[int, list]:
    """Field numbers to values of a protocol buffer: varints as int, strings and messages as
    bytes.
    """
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 == 5:
            value, at = data[at : at + 4], at + 4
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def read_bundle(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    """All float32 tensors of a TensorFlow checkpoint."""
    footer = index[-48:]
    _, at = varint(footer, 0)
    _, at = varint(footer, at)
    offset, at = varint(footer, at)
    size, _ = varint(footer, at)
    tensors = {}
    for _, handle in table_block(index, offset, size):
        start, at = varint(handle, 0)
        length, _ = varint(handle, at)
        for key, value in table_block(index, start, length):
            entry = message(value)
            if not key or entry.get(1) != [1]:  # the header, or not DT_FLOAT
                continue
            shape = [message(d).get(1, [0])[0] for d in message(entry.get(2, [b""])[0]).get(2, [])]
            begin, count = entry.get(4, [0])[0], entry[5][0]
            tensors[key.decode()] = np.frombuffer(data[begin : begin + count], "<f4").reshape(shape)
    return tensors


def ours(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """musicnn's tensors under our names, in torch's layouts."""

    def norm(number: int) -> dict[str, np.ndarray]:
        name = "batch_normalization" + (f"_{number}" if number else "")
        scale = tensors[f"{name}/gamma"] / np.sqrt(
            tensors[f"{name}/moving_variance"] + BATCH_NORM_EPSILON
        )
        return {
            "scale": scale,
            "shift": tensors[f"{name}/beta"] - scale * tensors[f"{name}/moving_mean"],
        }

    def weight(layer: str) -> np.ndarray:
        kernel = tensors[f"{layer}/kernel"]
        return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T

    out = {f"input_norm.{k}": v for k, v in norm(0).items()} | {
        f"pool_norm.{k}": v for k, v in norm(9).items()
    }
    for name, (layer, number) in LAYERS.items():
        out |= {
            f"{name}.layer.weight": weight(layer),
            f"{name}.layer.bias": tensors[f"{layer}/bias"],
        }
        out |= {f"{name}.norm.{k}": v for k, v in norm(number).items()}
    out |= {"tags.weight": weight("dense_1"), "tags.bias": tensors["dense_1/bias"]}
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="The musicnn wheel, as downloaded.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "musicnn",
        help="Folder for the weights.",
    )
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        tensors = read_bundle(
            wheel.read(FOLDER + ".index"), wheel.read(FOLDER + ".data-00000-of-00001")
        )
        licence = next(n for n in wheel.namelist() if n.endswith("LICENSE.md"))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "LICENSE").write_bytes(wheel.read(licence))
    weights = {k: v.half() for k, v in ours(tensors).items()}
    save_file(weights, args.out / "model.safetensors", {"format": "pt"})
    config = {
        "model": "MTT_musicnn",
        "source": "musicnn 0.1.0 (PyPI)",
        "licence": "ISC",
        "sample_rate": 16000,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{sum(v.numel() for v in weights.values()):,} numbers in {args.out}")


if __name__ == "__main__":
    main()
