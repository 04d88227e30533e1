"""`--print_completion`: a script that completes verbs, options and values of `magnet-train`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import capture_parser

from magnet_train.common.errors import UserError

SHELLS = ("bash", "zsh")


def completion_script(
    shell: str, verbs: dict[str, str], parsers: dict[str, Callable[[], Any]]
) -> str:
    """A script for the shell to source, made by shtab.

    Args:
        shell: bash or zsh.
        verbs: verbs with their descriptions.
        parsers: for each verb a function that parses options; it is stopped when it starts to.

    Raises:
        UserError: for another shell, or without shtab.
    """
    if shell not in SHELLS:
        raise UserError(f"--print_completion {shell}: choose {' or '.join(SHELLS)}")
    try:
        import shtab  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "--print_completion: shtab is missing; pip install -e '.[completion]'"
        ) from error
    program = argparse.ArgumentParser("magnet-train")
    program.add_argument("--version", action="store_true", help="Print the version.")
    program.add_argument("--print_completion", choices=SHELLS, help="Print a completion script.")
    added = program.add_subparsers()
    for verb, text in verbs.items():
        options = capture_parser(parsers[verb])
        for action in options._actions:
            _add_values(action, shtab.FILE)
        program_verb = added.add_parser(verb, help=text, parents=[options], add_help=False)
        if verb == "edit":  # FILE is read as --audio
            recording: Any = program_verb.add_argument("file", nargs="?", help="Recording.")
            recording.complete = shtab.FILE
    return shtab.complete(program, shell)


def _add_values(action: Any, files: Any) -> None:
    """Tell shtab the values of an option: those of a Literal or a boolean, otherwise files."""
    hint = getattr(action, "_typehint", None)
    if any(" " in name for name in action.option_strings):  # a link between options
        action.help = argparse.SUPPRESS
    elif hint is bool:
        action.choices = ("true", "false")
    elif values := [v for h in (hint, *get_args(hint)) for v in _literals(h)]:
        action.choices = values
    elif Path in (hint, *get_args(hint)) or action.dest in ("config", "checkpoint", "ckpt_path"):
        action.complete = files


def _literals(hint: Any) -> list[str]:
    return [str(value) for value in get_args(hint)] if get_origin(hint) is Literal else []
