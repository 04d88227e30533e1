"""Restricts the app to files and models in the allowed folders, and the model it started with."""

from dataclasses import dataclass
from pathlib import Path

from magnet_train.common.errors import UserError
from magnet_train.release import RAW

CHECKPOINT_SUFFIX = ".ckpt"


@dataclass(frozen=True)
class Access:
    """Folders and models that the page may use; symbolic links are resolved before the check."""

    folders: tuple[Path, ...]
    """Absolute folders; files below them may be opened."""
    models: tuple[str, ...] = ("demo",)
    """Models that are allowed although they are in none of the folders."""

    def path(self, text: str) -> Path:
        """The absolute path of a file or folder, which need not exist.

        Raises:
            UserError: if it is in none of them.
        """
        try:
            path = Path(text).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # loop, unknown user, null byte
            raise UserError(f"{text!r}: not a path ({error}); give another") from error
        if not any(path.is_relative_to(folder) for folder in self.folders):
            raise UserError(f"{text}: outside the allowed folders; start the app with --allow")
        return path

    def file(self, text: str) -> Path:
        """An existing file.

        Raises:
            UserError: if it is outside the allowed folders, or missing.
        """
        path = self.path(text)
        if not path.is_file():
            raise UserError(f"{text}: no such file; give another")
        return path

    def folder(self, text: str) -> Path:
        """An existing folder.

        Raises:
            UserError: if it is outside the allowed folders, or missing.
        """
        path = self.path(text)
        if not path.is_dir():
            raise UserError(f"{text}: no such folder; give another")
        self._check_links(path)
        return path

    def model(self, text: str) -> str:
        """The name of a model to load.

        Raises:
            UserError: if it is outside the allowed folders, or missing.
        """
        if text in self.models:
            return text
        path = self.path(text.removesuffix(RAW))
        if not path.exists():
            raise UserError(f"{text}: no such model; choose one from the list")
        self._check_links(path)
        return str(path) + (RAW if text.endswith(RAW) else "")

    def adapter(self, text: str) -> str:
        """A LoRA adapter, FOLDER or FOLDER:STRENGTH.

        Raises:
            UserError: if it is outside the allowed folders, or missing.
        """
        folder, colon, strength = text.rpartition(":")
        if not _is_number(strength):
            folder, colon, strength = text, "", ""
        return f"{self.folder(folder or text)}{colon}{strength}"

    def _check_links(self, folder: Path) -> None:
        """Raise a UserError if a link in the folder, or in its folders, leads elsewhere."""
        for entry in (*folder.glob("*"), *folder.glob("*/*")):
            if entry.is_symlink():
                self.path(str(entry))

    def list_models(self) -> list[str]:
        """The models given at the start, then releases and runs in the allowed folders."""
        found = [
            str(path.parent if path.name == "config.json" else path.parents[1])
            for folder in self.folders
            for pattern in ("config.json", f"checkpoints/*{CHECKPOINT_SUFFIX}")
            for path in _up_to_two_levels(folder, pattern)
        ]
        return list(dict.fromkeys([*self.models, *sorted(found)]))

    def list_runs(self) -> list[str]:
        """Run folders with validation clips in the allowed folders."""
        found = {
            str(path.parents[1])
            for folder in self.folders
            for path in _up_to_two_levels(folder, "validation/step_*")
        }
        return sorted(found)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _up_to_two_levels(folder: Path, pattern: str) -> list[Path]:
    """Matches of a pattern in a folder, in its folders, and in theirs."""
    return [path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + pattern)]
