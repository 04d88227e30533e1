"""Imports torchaudio even if its compiled extension was built for another torch.

The extension in torchaudio's wheels fails to load with a CPU-only or newer CUDA build of torch. Its
resampling, filters and spectrograms are plain Python and do not need the extension. A torchaudio
that is installed but cannot be imported also breaks transformers, which imports it.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from magnet_train.common.errors import UserError


def import_torchaudio() -> ModuleType:
    """torchaudio, without its compiled extension if that does not load.

    Raises:
        ModuleNotFoundError: if torchaudio is not installed.
        UserError: if it still cannot be imported.
    """
    try:
        return importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            raise
        reason: Exception = error
    except (ImportError, OSError, RuntimeError) as error:
        reason = error
    _remove_torchaudio()
    sys.modules["torchaudio._extension"] = _absent_extension(reason)
    try:
        return importlib.import_module("torchaudio")
    except Exception as error:
        _remove_torchaudio()
        raise UserError(
            f"torchaudio is installed but cannot be imported ({type(error).__name__}: {error}): "
            "install one made for this torch, or remove it with `pip uninstall torchaudio`"
        ) from error


def ensure_torchaudio_imports() -> None:
    """Import torchaudio if it is installed; call this before importing transformers."""
    if "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is not None:
        import_torchaudio()


def _absent_extension(reason: Exception) -> ModuleType:
    """The module `torchaudio._extension` of a torchaudio without compiled libraries."""

    def fail_if_no_align(function: object) -> object:
        def missing(*args: object, **kwargs: object) -> None:
            name = getattr(function, "__name__", "this function")
            raise RuntimeError(f"{name} needs torchaudio's extension") from reason

        return missing

    extension = ModuleType("torchaudio._extension")
    vars(extension).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=fail_if_no_align,
    )
    return extension


def _remove_torchaudio() -> None:
    """Remove the modules of a failed import, so that it can be tried again."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
