"""The one door to torchaudio, which survives a build made for another torch.

torchaudio's wheels carry a compiled extension that fails to load beside a CPU-only or a newer CUDA torch.
Its resampling, filters and spectrograms are plain Python and need none of it; torchaudio itself runs without
the extension where the library file is absent. And a torchaudio that is installed but cannot be imported breaks
transformers too, which imports whatever is installed.
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
        UserError: if it cannot be imported even so.
    """
    try:
        return importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            raise
        reason: Exception = error
    except (ImportError, OSError, RuntimeError) as error:
        reason = error
    _forget_torchaudio()
    sys.modules["torchaudio._extension"] = _absent_extension(reason)
    try:
        return importlib.import_module("torchaudio")
    except Exception as error:
        _forget_torchaudio()
        raise UserError(
            f"torchaudio is installed but broken ({type(error).__name__}: {error}): install one made for this torch, "
            "or remove it with `pip uninstall torchaudio`"
        ) from error


def mend_torchaudio() -> None:
    """To be called before transformers is imported: loads torchaudio, if installed, through the door above."""
    if "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is not None:
        import_torchaudio()


def _absent_extension(reason: Exception) -> ModuleType:
    """What `torchaudio._extension` is where torchaudio was installed without its libraries."""

    def fail_if_no_align(function: object) -> object:
        def missing(*args: object, **kwargs: object) -> None:
            raise RuntimeError(
                f"{getattr(function, '__name__', 'this function')} needs torchaudio's extension"
            ) from reason

        return missing

    extension = ModuleType("torchaudio._extension")
    vars(extension).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=fail_if_no_align,
    )
    return extension


def _forget_torchaudio() -> None:
    """Removes what a failed import left behind, or the next attempt would find half a package."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
