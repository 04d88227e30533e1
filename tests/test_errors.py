"""Which errors are user errors, and which are bugs with a traceback."""

import errno
import itertools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from magnet_train.common.errors import (
    REMEDIES,
    UserError,
    integer_from_environment,
    user_error_from,
)
from magnet_train.common.ranges import check_values


def raised(*errors: BaseException) -> BaseException:
    """The first error, raised from the second, raised from the third, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


REMOTE = """Caught UserError in DataLoader worker process 0.
Traceback (most recent call last):
  File "x.py", line 1, in f
magnet_train.common.errors.UserError: shard a.tar: damaged; copy it again"""


PYDANTICS = type("ValidationError", (ValueError,), {"__module__": "pydantic_core"})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a: b"), "a: b"),
        (raised(ValueError("x"), KeyError("y"), UserError("a: b")), "a: b"),
        (RuntimeError(REMOTE), "shard a.tar: damaged; copy it again"),
        (UserError(REMOTE), "shard a.tar: damaged; copy it again"),
        (MisconfigurationException("no\n gpu"), "no gpu"),
        (ModuleNotFoundError("no 'x'.\nHINT: Try running `pip install x`"), "no 'x'. HINT: Try"),
        (RuntimeError("You set `--ntasks=2` in your SLURM bash script, but"), "You set `--ntasks"),
        (ValueError("Invalid boolean value for environment variable X: y"), "Invalid boolean"),
        (PYDANTICS("1 validation error for Settings\nmode\n [type=x]"), "W&B: 1 validation error"),
        (torch.distributed.DistNetworkError("no\nanswer"), "no answer; check MASTER_ADDR"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "DataLoader"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory (CUDA out of memory.);"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        *((OSError(number, "x", "f"), f"f: {text}") for number, text in REMEDIES.items()),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(error, line):
    found = user_error_from(error)
    assert found is not None and str(found).startswith(line) and "\n" not in str(found)


def test_credentials_in_urls_are_not_shown():
    error = raised(ValueError(), UserError("s3://key:SECRET@b/x: not as https://b/x?sig=SECRET"))
    assert str(user_error_from(error)) == "s3://***@b/x: not as https://b/x?***"
    remote = REMOTE.replace("a.tar", "http://me:SECRET@host/a.tar")
    assert "SECRET" not in str(user_error_from(RuntimeError(remote)))


def test_an_error_is_one_line():
    """Names in files of others have newlines, as in a CSV with an open quote."""
    assert str(UserError("r.csv line 2: a\n  b\n\nis not in this study")) == (
        "r.csv line 2: a b is not in this study"
    )
    assert str(UserError(REMOTE)) == "shard a.tar: damaged; copy it again"


def test_names_of_strangers_cannot_write_to_the_terminal():
    assert str(UserError("a\x1b[2J\ud800\u2028é.wav")) == r"a\x1b[2J\ud800\u2028é.wav"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault."),
        *(ValueError("x"), KeyError("x"), OSError(errno.EIO, "x"), AssertionError()),
        ModuleNotFoundError("No module named 'x'"),
    ],
    ids=repr,
)
def test_a_bug_is_none(error):
    assert user_error_from(error) is None
    assert user_error_from(raised(RuntimeError("y"), error)) is None


def test_a_bug_while_a_mistake_is_handled_is_none():
    def handle(what):
        with pytest.raises(LookupError) as caught:
            try:
                raise UserError("a: b")
            except UserError:
                what()
        return user_error_from(caught.value)

    assert handle(lambda: check_values({}, x="[0, 1]")) is None  # a KeyError in this package
    assert str(handle(lambda: {}["x"])) == "a: b"  # in another, as at the end of a run


def test_numbers_in_the_environment_are_checked(monkeypatch):
    monkeypatch.setenv("A_NUMBER", " 3 ")
    assert integer_from_environment("A_NUMBER") == 3
    monkeypatch.setenv("A_NUMBER", "")
    assert integer_from_environment("A_NUMBER", 7) == 7
    monkeypatch.setenv("A_NUMBER", "abc")
    with pytest.raises(UserError, match="A_NUMBER=abc"):
        integer_from_environment("A_NUMBER")
