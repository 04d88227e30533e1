"""Removes passwords and signatures from URLs."""

import re

# A path has one of the two slashes.
_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.:-]*:/{1,2})(?P<user>[^\s/]*@)?(?P<rest>[^\s'\"<>]*)"
)
_USER = re.compile(r"[^\s/:@'\"]+:[^\s/@]+@(?=\w)")
"""Credentials without a scheme, as stores show them."""


def redact(text: object) -> str:
    """Remove user, password, query and fragment of all URLs in a text.

    Used for all output that may contain a URL given by the user: the query of a signed URL is its
    signature.

    >>> redact("s3://key:secret@music/train: not there")
    's3://***@music/train: not there'
    >>> redact("https://host/a.tar?X-Amz-Signature=abc&Expires=5")
    'https://host/a.tar?***'
    >>> redact("https://key:what?'#@host/a.tar")
    'https://***@host/a.tar'
    >>> redact("failed to read key:secret@music/train")
    'failed to read ***@music/train'
    """
    return _USER.sub("***@", _ADDRESS.sub(_redact_address, str(text)))


def _redact_address(match: re.Match[str]) -> str:
    place, mark, _ = _split_at_first(match["rest"], "?#")
    user, _, host = place.rpartition("@")
    hidden = f"***@{host}" if user or match["user"] else host
    return f"{match['scheme']}{hidden}{mark}{'***' if mark else ''}"


def _split_at_first(text: str, marks: str) -> tuple[str, str, str]:
    """The text before the first of the marks, that mark, and what follows."""
    for position, character in enumerate(text):
        if character in marks:
            return text[:position], character, text[position + 1 :]
    return text, "", ""
