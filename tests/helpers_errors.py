"""The one-line message of a user error."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from magnet_train.__main__ import main
from magnet_train.common.errors import UserError


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which a call is refused, which is always one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command_error(capture: Any, *args: str) -> str:
    """The error of a refused command, which is one line and comes without a traceback.

    `capture` is pytest's capsys, or capfd if other processes print.
    """
    capture.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(list(args)) == 2
    text = capture.readouterr().err
    (line,) = [x for x in text.splitlines() if x.startswith("error:")]
    assert "Traceback" not in text
    return line
