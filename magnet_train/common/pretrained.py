"""Finds a pretrained component by name, a local folder or a hub id, and says in one line why it cannot.

A folder that exists wins. A hub id is looked up in the local cache first, so that a cached component needs no
network and does not change under a run; only then is the hub asked, and only if it can be reached.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from magnet_train.common.errors import UserError

T = TypeVar("T")

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def load_pretrained(
    what: str, name: str, load: Callable[[str, bool], T], marks: Sequence[str] = ("config.json",)
) -> T:
    """`load(source, local_files_only)` for the folder or hub id `name`.

    Args:
        what: The option's meaning, for messages, such as "codec".
        name: A folder that exists, or a hub id such as `facebook/encodec_32khz`.
        load: Called with the folder or id and whether the network is off limits; it may be called twice.
        marks: Files one of which a folder must hold.

    Raises:
        UserError: if the folder is missing or broken, the hub has no such id, or there is no network.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _load_folder(what, path, load, marks)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise UserError(
            f"{what} {name!r}: no such folder; give a folder that transformers wrote, or a hub id"
        )
    try:
        with quiet():
            return load(name, True)
    except UserError:
        raise
    except OSError:  # transformers' way to say that something is not in the cache
        pass
    except Exception as error:
        raise UserError(
            f"{what} {name!r} in the local cache cannot be loaded: {one_line(error)}"
        ) from error
    _require_hub(what, name)
    try:
        with quiet():
            return load(name, False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{what} {name!r} cannot be loaded from the hub: {one_line(error)}"
        ) from error


def absolute_path(name: str) -> str:
    """A component's name that holds in every working directory: a folder by its whole path, all else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


def one_line(error: BaseException, limit: int = 240) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__


def offline_switch() -> str | None:
    """The environment variable that forbids the network, if one is set."""
    return next(
        (
            s
            for s in OFFLINE_SWITCHES
            if os.environ.get(s, "").upper() in ("1", "ON", "YES", "TRUE")
        ),
        None,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load reports: what they warn of is checked here and raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_folder(what: str, path: Path, load: Callable[[str, bool], T], marks: Sequence[str]) -> T:
    if not any((path / mark).is_file() for mark in marks):
        raise UserError(
            f"{what} {str(path)!r}: no {' or '.join(marks)} there; "
            "give a folder that transformers' save_pretrained wrote"
        )
    try:
        with quiet():
            return load(str(path), True)
    except UserError:
        raise
    except Exception as error:
        broken = _broken_weights(path)
        if broken:
            raise UserError(
                f"{what}: {broken} is broken or cut short; copy or download it again"
            ) from error
        raise UserError(f"{what} {str(path)!r} cannot be loaded: {one_line(error)}") from error


def _broken_weights(folder: Path) -> Path | None:
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
    """Asks the hub for `name` once and briefly: transformers itself retries an unreachable hub for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    remedy = "give a local folder, or run once where there is network"
    if switch := offline_switch():
        raise UserError(
            f"{what} {name!r}: no such folder, not in the local cache, and {switch} is set: {remedy}"
        )
    try:
        HfApi().model_info(name, timeout=10)
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{what} {name!r}: no such folder, not in the local cache, and the hub is off: {remedy}"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"{what} {name!r}: neither a folder nor a hub id: {one_line(error)}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{what} {name!r}: no such folder, and the hub refuses it: {one_line(error)}"
        ) from error
    except Exception as error:
        raise UserError(
            f"{what} {name!r}: no such folder, not in the local cache, and no network ({one_line(error)}): {remedy}"
        ) from error
