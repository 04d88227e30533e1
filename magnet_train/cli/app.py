"""`app`: a local web app to generate, edit and compare."""

from dataclasses import dataclass, field
from pathlib import Path

from magnet_train.cli.output import check_device, find_device
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_values


@dataclass(frozen=True)
class AppOptions:
    """Options of `app`."""

    model: str = "demo"
    """Model to start with: release folder, hub id, checkpoint, run folder, or "demo"."""
    allow: list[Path] = field(default_factory=lambda: [Path("runs")])
    """Folders whose recordings, models and runs may be opened; others are refused."""
    out: Path = Path("generated")
    """Folder for the audio files, each with a JSON to reproduce it."""
    port: int = 7860
    """Port on 127.0.0.1."""
    share: bool = False
    """Also create a public link, by a tunnel of Gradio's servers."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 …; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        check_values(self, "--", port="[1, 65535]")
        check_device(self.device)


def app(options: AppOptions) -> None:
    """Serve the app until interrupted.

    Raises:
        UserError: if gradio is missing, or the model, a folder, the device or the port cannot be
            used.
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install -e '.[app]'")
    from magnet_train.app.studio import Studio

    studio = Studio(options.model, options.allow, options.out, find_device(options.device))
    from magnet_train.app.page import serve

    serve(studio, options.port, options.share)
