"""The one-line message of a user error."""

from collections.abc import Callable
from typing import Any

import pytest

from magnet_train.common.errors import UserError


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which a call is refused, which is always one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
