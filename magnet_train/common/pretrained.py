"""Loads pretrained components from a folder or the hub, with one-line errors.

An existing folder has precedence. A hub id is looked up in the local cache first, so that a cached
component needs no internet access and does not change during a run, and then on the hub. Code of a
model is never executed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from magnet_train.common.errors import UserError
from magnet_train.common.json_files import read_json
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

T = TypeVar("T")
Load = Callable[[str, bool], T]

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
MAX_PARAMETERS_PER_BYTE = 4
"""A file may lack parts that are not used, such as T5's decoder; parameters take 2 or 4 bytes."""
MAX_LAYERS = 1000
"""Layers of one kind, codebooks, and entries of a list in a configuration."""
MAX_NUMBER = float(1 << 31)
OWN_TYPES = "magnet_train_"
"""Beginning of the `model_type` of this package's networks, which need no transformers: importing
it takes longer than generating ten seconds of audio."""
MAX_DEPTH = 20


def load_pretrained(
    what: str, name: str, load: Load[T], required: Sequence[str] = ("config.json",)
) -> T:
    """`load(source, local_files_only)` for the folder or hub id `name`.

    Args:
        what: kind of component, for messages, such as "codec".
        name: an existing folder, or a hub id such as `facebook/encodec_32khz`.
        load: called with the folder or id, and whether only local files may be used; may be called
            twice.
        required: file names; a folder must have one of them.

    Raises:
        UserError: if the folder is missing, damaged or has code, the hub has no such id, or there
            is no internet access.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return _load_folder(what, path, load, required)
    if path.is_absolute() or name.startswith((".", "~")) or not name or name.count("/") > 1:
        raise UserError(
            f"{what} {name!r}: no such folder; give a folder saved by transformers, or a hub id"
        )
    in_cache = f"{what} {name!r} in the local cache cannot be loaded"
    with _failing_as(in_cache), suppress(OSError), quiet():  # OSError: it is not there
        return load(name, True)
    _require_hub(what, name)
    with _failing_as(f"{what} {name!r} cannot be loaded from the hub"), quiet():
        return load(name, False)


@contextmanager
def _failing_as(what_failed: str) -> Iterator[None]:
    """Turns errors of any type, of which transformers raises dozens, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what_failed}: {one_line(error)}") from error


def load_complete(
    model_class: str,
    source: str,
    local_files_only: bool,
    what: str,
    optional: Sequence[str] = (),
) -> Any:
    """A transformers model from a folder or hub id, in float32.

    Args:
        model_class: Its class in transformers.
        source: Folder or hub id.
        local_files_only: Do not ask the hub.
        what: The component, for messages, such as "codec 'demo'".
        optional: Parts of the names of weights that may be missing.

    Raises:
        UserError: if weights are missing.
    """
    ensure_torchaudio_imports()
    import transformers

    model, report = getattr(transformers, model_class).from_pretrained(
        source,
        local_files_only=local_files_only,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    keys = sorted(report["missing_keys"])
    missing = [key for key in keys if not any(part in key for part in optional)]
    if missing:  # transformers would continue with random weights
        raise UserError(
            f"{what}: its weights lack {missing[0]} and {len(missing) - 1} more; "
            "use a complete copy"
        )
    return model


def absolute_path(name: str) -> str:
    """A component's name with an absolute path if it is a folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


def one_line(error: BaseException, limit: int = 240) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__


def offline_variable() -> str | None:
    """The environment variable that disables the network, if one is set."""
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load reports; callers check for errors."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _load_folder(what: str, path: Path, load: Load[T], required: Sequence[str]) -> T:
    if not any((path / name).is_file() for name in required):
        raise UserError(
            f"{what} {str(path)!r}: no {' or '.join(required)} there; "
            "give a folder written by transformers' save_pretrained"
        )
    if odd := [e.name for e in path.iterdir() if not (e.is_file() or e.is_dir())]:
        raise UserError(f"{what} {str(path)!r}: {odd[0]} is not a regular file; remove it")
    _refuse_code(what, path)
    if damaged := _damaged_weights(path):
        raise UserError(f"{what}: {damaged} is damaged or truncated; copy or download it again")
    is_ours = str(read_model_type(path)).startswith(OWN_TYPES)
    if not is_ours:
        _check_size(what, path)
    failure = f"{what} {str(path)!r} cannot be loaded"
    with _failing_as(failure), nullcontext() if is_ours else quiet():
        return load(str(path), True)


def read_model_type(folder: Path) -> Any:
    """`model_type` of the config.json in a folder; None without one."""
    file = folder / "config.json"
    return read_json(file).get("model_type") if file.is_file() else None


def _refuse_code(what: str, folder: Path) -> None:
    """Refuse a configuration that names Python code of the folder, which transformers would run."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            config = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{what}: {file} is damaged ({one_line(error)}); copy or download it again"
            ) from error
        if not isinstance(config, dict) or "auto_map" in config:
            raise UserError(
                f"{what} {str(folder)!r}: {name} needs code of the model (auto_map), which is "
                "never run; choose a model that transformers supports"
            )


def _check_size(what: str, folder: Path) -> None:
    """Refuse a configuration of a network far larger than the weights next to it.

    transformers would allocate the missing weights before it reports them.
    """
    import torch

    ensure_torchaudio_imports()
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    stored = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    if not (folder / "config.json").is_file() or not stored:  # a tokenizer, or an error later
        return
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:  # checked by its own loader
        return
    try:
        _check_counts(values)
        if values["model_type"] == "musicgen":  # AutoModel cannot build it from its configuration
            return
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_counts({"quantizer_layers": getattr(config, "num_quantizers", 0)})
        with torch.device("meta"), quiet(), no_init_weights():
            model = AutoModel.from_config(config, trust_remote_code=False)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > MAX_PARAMETERS_PER_BYTE * stored:
            raise ValueError(f"{size:,} parameters, but {stored:,} bytes of weights")
    except UserError:
        raise
    except Exception as error:  # a dozen kinds, from a wrong type to a size beyond 64 bits
        raise UserError(
            f"{what} {str(folder)!r}: config.json describes no possible network "
            f"({one_line(error)}); copy or download it again"
        ) from error


def _check_counts(values: dict[str, Any], depth: int = 0) -> None:
    """Raise ValueError for a number of layers, or another number, that is out of range."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    for name, value in values.items():
        is_count = any(word in name for word in ("layer", "codebooks", "depth"))
        limit = MAX_LAYERS if is_count else MAX_NUMBER
        parts = value if isinstance(value, list) else [value]
        numbers = [n for n in parts if isinstance(n, int | float)]
        if len(parts) > MAX_LAYERS or not all(-MAX_NUMBER <= n <= limit for n in numbers):
            raise ValueError(f"{name}={str(value)[:80]} is out of range")
        if isinstance(value, dict):
            _check_counts(value, depth + 1)


def _damaged_weights(folder: Path) -> Path | None:
    """The first safetensors file in `folder` whose header or length is wrong."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception:
            return file
    return None


def _require_hub(what: str, name: str) -> None:
    """Check that the hub has `name`; transformers would retry an unreachable hub for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    remedy = "give a local folder, or run once on a machine with internet access"
    absent = f"{what} {name!r}: no such folder, not in the local cache, and"
    if variable := offline_variable():
        raise UserError(f"{absent} {variable} is set: {remedy}")
    try:
        HfApi().model_info(name, timeout=10)
    except OfflineModeIsEnabled as error:
        raise UserError(f"{absent} the hub is disabled: {remedy}") from error
    except HFValidationError as error:
        raise UserError(
            f"{what} {name!r}: neither a folder nor a hub id: {one_line(error)}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{absent} the hub denies access: {one_line(error)}") from error
    except Exception as error:
        raise UserError(f"{absent} no internet access ({one_line(error)}): {remedy}") from error
