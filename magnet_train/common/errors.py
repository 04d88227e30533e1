"""The one exception that is the user's to mend."""

import re


class UserError(Exception):
    """A mistake in what the user gave: one line that names the file or option, its value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def user_error_of(error: BaseException) -> UserError | None:
    """The user's mistake that an error comes from, None if it is another: itself, a cause, or one in another process.

    Those from loader processes and forked ranks arrive as the text of a traceback; the line is what counts of it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) and "\n" not in str(cause):
            return cause
        cause = cause.__cause__
    lines = re.findall(rf"^{UserError.__module__}\.{UserError.__qualname__}: (.+)$", str(error), re.MULTILINE)
    return UserError(lines[-1]) if lines else None


PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
"""What to give where a parser expects a type."""


def message_of(text: str) -> str:
    """A parser's message in one line, without the long way it came.

    >>> message_of("Parser key \\"model.span_len\\":\\n  - Expected a <class 'int'>. Got value: three")
    '--model.span_len=three: give a whole number'
    """
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    message = " ".join(dict.fromkeys(lines))[:600]
    if found := re.fullmatch(r"Parser key \"(\S+)\": Expected a <class '(\w+)'>\. Got value: (.*)", message):
        name, kind, value = found.groups()
        return f"--{name}={value}: give {PLAIN.get(kind, f'a value of type {kind}')}"
    return message
