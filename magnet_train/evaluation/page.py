"""Self-contained HTML pages with embedded audio, images, style and script.

Used by the report and the listening test. Style and scripts are separate files in `pages/` for
editors and linters.
"""

import base64
import hashlib
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from magnet_train.common.errors import UserError
from magnet_train.common.folders import written
from magnet_train.common.redact import redact
from magnet_train.data.audio import read_as_recorded

Audio = Path | tuple[np.ndarray, int]
"""A file, or a waveform `t` or `t channels` in [-1, 1] and its sample rate in Hz."""

MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_PAGES = Path(__file__).parent / "pages"


def read_sound(audio: Audio, name: str = "audio") -> tuple[np.ndarray, int]:
    """Samples `t channels` (one or two channels, float32) and their sample rate in Hz.

    Args:
        audio: file or waveform.
        name: name of a waveform in errors.

    Raises:
        UserError: if the file is unreadable, empty or truncated, or samples are NaN or infinite.
    """
    if isinstance(audio, Path):
        return read_as_recorded(audio)
    wav, sample_rate = audio
    wav = np.asarray(wav, dtype=np.float32)
    wav = wav[:, None] if wav.ndim == 1 else wav
    if wav.ndim != 2 or not 1 <= wav.shape[1] <= 2 or len(wav) == 0:
        raise UserError(
            f"{name}: samples of shape {wav.shape}; give `t` or `t channels`, one or two channels"
        )
    if not np.isfinite(wav).all():
        raise UserError(f"{name}: has NaN or infinite samples; remove the clip")
    return wav, int(sample_rate)


def audio_uri(wav: np.ndarray, sample_rate: int, lossless: bool = False) -> str:
    """Samples `t channels` as a data URI with MP3 or 16-bit FLAC, which all browsers play.

    Ten seconds of music at 16 kHz mono take 52 kB as MP3 (libsndfile's default variable bit rate),
    250 kB as FLAC and 320 kB as WAV; at 44.1 kHz 92, 400 and 882 kB. Ogg Vorbis is as small as MP3
    but not supported by older Safari versions. MP3 keeps the number of samples. FLAC is used if MP3
    does not support the sample rate, or libsndfile was built without MP3.

    Args:
        wav: samples in [-1, 1]; larger ones are clipped.
        sample_rate: sample rate in Hz.
        lossless: use FLAC, for listening tests.
    """
    buffer = io.BytesIO()
    is_mp3 = not lossless and "MP3" in soundfile.available_formats() and sample_rate in MP3_RATES
    form, subtype = ("MP3", "MPEG_LAYER_III") if is_mp3 else ("FLAC", "PCM_16")
    soundfile.write(buffer, np.clip(wav, -1, 1), sample_rate, subtype, format=form)
    return data_uri("audio/mpeg" if is_mp3 else "audio/flac", buffer.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """`content` as the value of a `src` attribute."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def text(value: Any) -> str:
    """Escape `value` for HTML text and attributes, and remove credentials from URLs.

    >>> text('</script><b>"bold"</b>')
    '&lt;/script&gt;&lt;b&gt;&quot;bold&quot;&lt;/b&gt;'
    """
    return html.escape(redact(value), quote=True)


def write_page(path: Path, title: str, body: str, script: str) -> int:
    """Write the page; returns its size in bytes.

    Its Content-Security-Policy forbids connections and all other scripts, so that unescaped text
    could not run.

    Args:
        path: the HTML file; its folder is created if needed.
        title: window title; escaped here.
        body: HTML with escaped text.
        script: name of a file in `pages/`.

    Raises:
        UserError: if the file cannot be written.
    """
    code, style = ((_PAGES / name).read_text(encoding="utf-8") for name in (script, "style.css"))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri "
        f"'none'; form-action 'none'; script-src 'sha256-{digest}'"
    )
    content = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{code}</script>\n</body>\n</html>\n"
    ).encode("utf-8", errors="replace")  # file names may not be valid Unicode
    with written(path) as temporary:
        temporary.write_bytes(content)
    return len(content)
