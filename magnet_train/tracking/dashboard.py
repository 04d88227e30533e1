"""`dashboard`: creates a W&B workspace with panels for all logged metrics, by section."""

from dataclasses import dataclass
from typing import Any

from magnet_train.common import private_api
from magnet_train.common.errors import UserError
from magnet_train.tracking.logged import ARROWS, HOURS, LOGGED, SECTIONS, STEP, Logged

NAME = "magnet_train"
"""Displayed name of the workspace."""
ID = "magnettrain"
"""Name of the workspace in its URL."""
OVER_HOURS = (
    "val/ce",
    "val/fad/{embedder}",
    "val/kl/{embedder}",
    "val/text/{embedder}",
    "train/loss",
)
"""Metrics also plotted over hours of audio, to compare runs with different batch sizes."""


@dataclass(frozen=True)
class DashboardOptions:
    """Options of `dashboard`."""

    entity: str
    """W&B user or team."""
    project: str = "magnet_train"
    """W&B project; it must have a run."""


def workspace(options: DashboardOptions) -> Any:
    """The unsaved workspace: one section per entry of `SECTIONS`, and one over hours of audio.

    Raises:
        UserError: if the package is missing.
    """
    ws = _workspaces()
    sections = [
        ws.Section(
            name=section,
            panels=[
                _panel(entry, STEP) for entry in LOGGED if entry.section == section and entry.shown
            ],
            is_open=section in SECTIONS[:2],
        )
        for section in SECTIONS
    ]
    over_hours = [_panel(entry, HOURS) for entry in LOGGED if entry.name in OVER_HOURS]
    sections.insert(3, ws.Section(name="over hours of audio", panels=over_hours))
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(
        entity=options.entity,
        project=options.project,
        name=NAME,
        sections=sections,
        settings=settings,
    )


def dashboard(options: DashboardOptions) -> str:
    """Save the workspace, replacing the one of an earlier call; returns its URL.

    Raises:
        UserError: if the package or a key is missing, or W&B cannot be reached or refuses the key
            or the project.
    """
    made = workspace(options)
    ws = _workspaces()
    from magnet_train.tracking.wandb_session import check_wandb_login  # with Lightning

    state, reason = check_wandb_login()
    if state == "off":
        raise UserError(
            f"W&B is {reason} here, but the workspace is on its server: unset WANDB_MODE, and "
            "run this with internet access"
        )
    remedy = "`wandb login` on a machine with internet access sets a key, or WANDB_API_KEY"
    if state != "online":
        raise UserError(f"W&B: {reason}; {remedy}")
    try:
        private_api.name_workspace(made, f"nw-{ID}-v")
        try:  # without an id W&B would create another workspace of this name
            before = ws.Workspace.from_url(
                f"https://wandb.ai/{options.entity}/{options.project}?nw={ID}"
            )
            private_api.replace_workspace(made, before)
        except ValueError as error:
            if not str(error).startswith("Workspace"):
                raise UserError(
                    f"--entity {options.entity} --project {options.project}: W&B has no such "
                    "project, or not for this key; log a run into it first"
                ) from error
        return made.save().url
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise UserError(f"W&B: {' '.join(str(error).split())[:300]}; {remedy}") from error


def _panel(entry: Logged, x: str) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, WeavePanelSummaryTable

    if entry.name == "gen/clips":
        return WeavePanelSummaryTable(table_name=entry.name)
    if entry.is_media:
        return MediaBrowser(title=entry.name, media_keys=[entry.name], gallery_axis="step")
    title = f"{entry.name} {ARROWS[entry.better]}".strip()
    if "{" in entry.name:
        return LinePlot(title=title, x=x, metric_regex=f"^{entry.pattern}$")
    return LinePlot(title=title, x=x, y=[entry.name])


def _workspaces() -> Any:
    try:
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise UserError(
            "dashboard: the package wandb-workspaces is missing; install it with `pip install -e "
            "'.[dashboard]'`"
        ) from error
    return ws
