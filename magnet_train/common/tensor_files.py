"""Reads and verifies files of torch.save and safetensors, without executing code in them."""

import hashlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.folders import require_file
from magnet_train.common.pretrained import one_line

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by name."""

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


def read_pickle(path: Path, remedy: str) -> Any:
    """Load a file of torch.save: memory-mapped tensors and plain values.

    Also verifies the checksums of the zip archive, which torch.load does not do.

    Args:
        path: the file.
        remedy: end of the error message.

    Raises:
        UserError: if the file is missing, damaged, or needs code.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a named pipe would wait for its writer
            raise UserError(f"{path}: not a regular file; {remedy}")
        if zipfile.is_zipfile(path):
            _verify_zip(path, about.st_size, about.st_mtime_ns)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # The format before torch 1.6 has no checksums and cannot be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {remedy}") from error
    except Exception as error:  # the type depends on where the file is damaged
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path}: needs {code[1]}, which could run code; {remedy}") from error
        reason = one_line(error, 200).partition(". ")[0]  # the rest is advice about torch
        reason = reason.replace("Weights only load failed", "not tensors and plain values only")
        raise UserError(f"{path}: damaged or truncated ({reason}); {remedy}") from error


@lru_cache(maxsize=64)
def _verify_zip(path: Path, size: int, mtime_ns: int) -> None:
    """Verify all CRCs of an archive, once per size and modification time."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("compressed entries, which torch.save does not write")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def safetensors_shapes(path: Path, remedy: str) -> Shapes:
    """Shapes of the tensors in a safetensors file, read from its header.

    Raises:
        UserError: if the file is missing or damaged, or a tensor is not floating-point.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                part = file.get_slice(name)
                if part.get_dtype() not in SAFETENSORS_DTYPES.values():
                    raise UserError(
                        f"{path}: {name} is {part.get_dtype()}, not floating-point; {remedy}"
                    )
                shapes[name] = tuple(part.get_shape())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error, remedy) from error
    return shapes


def _damaged(path: Path, error: Exception, remedy: str) -> UserError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"{path}: missing or damaged ({reason}); {remedy}")


def tensor_shapes(tensors: Mapping[str, Any]) -> Shapes:
    """Shape of each tensor; () for what is not a tensor."""
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def check_same_shapes(expected: Shapes, found: Shapes, source: Path) -> None:
    """Check names and shapes of a file's tensors.

    Raises:
        UserError: that names the first difference.
    """
    differences = {
        "lacks": expected.keys() - found.keys(),
        "has the unknown": found.keys() - expected.keys(),
    }
    for problem, names in differences.items():
        if names:
            raise UserError(
                f"{source}: {problem} {min(names)} and {len(names) - 1} more; "
                "the file does not match the model configuration"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{source}: {name} is {found[name]}, expected {shape}; "
                "the file does not match the model configuration"
            )


def read_safetensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_file(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error, remedy) from error


def write_safetensors(
    path: Path, tensors: Mapping[str, Callable[[], Tensor]], about: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file one tensor at a time; returns its SHA-256.

    safetensors' own writer copies all tensors: 3.5 GB more for the largest published model.

    Args:
        path: the file.
        tensors: functions that return the tensors; each is called twice, for header and data.
        about: further metadata.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(about or {})}
    end = 0
    for name, make in tensors.items():
        tensor = make()
        begin = end
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for make in tensors.values():
            data = make().detach().contiguous().flatten().view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_numbers(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Check that tensors are floating-point and finite.

    Raises:
        UserError: for the first tensor that is not.
    """
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.dtype not in SAFETENSORS_DTYPES
        ):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise UserError(
                f"{source}: {name} is {kind}, not a dense floating-point tensor; use another file"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} has NaN or infinite values: the run diverged or the file is "
                "damaged; use an earlier checkpoint"
            )
