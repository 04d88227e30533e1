"""Removes passwords and signatures from URLs."""

import re

# pathlib collapses the two slashes into one.
_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.:-]*:/{1,2})(?P<user>[^\s/]*@)?(?P<rest>[^\s'\"<>]*)"
)
_USER = re.compile(r"[^\s/:@'\"]+:[^\s/@]+@(?=\w)")
"""Credentials without a scheme, as in error messages of stores."""


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
    place, *query = re.split("([?#])", match["rest"], maxsplit=1)
    user, _, host = place.rpartition("@")
    hidden = f"***@{host}" if user or match["user"] else host
    return match["scheme"] + hidden + (f"{query[0]}***" if query else "")
