"""The report, read with an HTML parser: complete, self-contained, with escaped captions."""

import base64
import hashlib
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
from helpers_errors import refusal
from helpers_html import HOSTILE, RATE, Page, read, sound, tone

from magnet_train.evaluation.page import audio_uri
from magnet_train.evaluation.report import Report, ReportClip, write_report


def hostile_report() -> Report:
    order = np.array([[-1, 0, 1, 2], [1, 0, 1, 0]])
    clips = [
        {
            name: ReportClip(
                (tone(), RATE),
                HOSTILE,
                np.arange(8).reshape(2, 4),
                order,
                score,
                {HOSTILE: HOSTILE},
            )
            for name, score in ((HOSTILE, float(i)), ("b", -float(i)))
        }
        for i in range(4)
    ]
    return Report(
        HOSTILE,
        {HOSTILE: HOSTILE},
        clips,
        {HOSTILE: [(0, 1.0, 0.5, 1.5), (1, 2.0, 1.5, 2.5)]},
        [
            {
                "metric": HOSTILE,
                "value": 1.25,
                "interval": (1.0, 1.5),
                "num_clips": 12,
                "seed": None,
                HOSTILE: HOSTILE,
            }
        ],
        [HOSTILE],
        HOSTILE,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("report") / "sub" / "report.html"
    size = write_report(path, hostile_report())
    assert size == path.stat().st_size
    return read(path)


def test_every_clip_is_one_player_and_nothing_is_loaded(page: Page):
    assert len(page.all("audio")) == 8
    assert page.loaded() == []
    assert {a["src"][:16] for a in page.all("audio")} <= {"data:audio/mpeg;", "data:audio/flac;"}
    assert "http" not in "".join(page.scripts)


def test_hostile_text_stays_text_everywhere(page: Page):
    assert not page.all("b")
    assert all(
        image["src"].startswith(("data:image/jpeg;", "data:image/svg")) for image in page.all("img")
    )
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    shown = " ".join(HOSTILE.split())
    # title, heading, note, metric, two ends of the protocol, chart, score, 4 captions, 8 links to
    # them at the least
    assert page.text.count(shown) >= 20
    assert len(page.all("script")) == 1


def test_the_policy_allows_the_one_script_and_no_connection(page: Page):
    (policy,) = [
        m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_controls_have_names_and_links_lead_somewhere(page: Page):
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert len(ids) == len([a for _, a in page.elements if "id" in a])
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= ids
    assert {b["data-plays"] for b in page.all("button") if "data-plays" in b} <= ids
    for tag in ("audio", "canvas"):
        assert all(a.get("aria-label") for a in page.all(tag)), tag
    assert all(image["alt"] for image in page.all("img"))


def test_codes_and_order_come_back_from_the_page(page: Page):
    grids = [a for a in page.all("div") if "data-rows" in a]
    assert len(grids) == 8 and (grids[0]["data-rows"], grids[0]["data-columns"]) == ("2", "4")
    order = np.frombuffer(base64.b64decode(grids[0]["data-order"]), "<i2")
    assert order.tolist() == [-1, 0, 1, 2, 1, 0, 1, 0]
    codes = np.frombuffer(base64.b64decode(grids[0]["data-codes"]), "<u2")
    assert codes.tolist() == list(range(8))


def test_best_and_worst_of_each_system_by_score(page: Page):
    plays = [b["data-plays"] for b in page.all("button") if "data-plays" in b]
    expected = ("0-0", "1-0", "3-0", "2-0", "3-1", "2-1", "0-1", "1-1")
    assert plays == [f"clip-{clip}" for clip in expected]


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (32_000, 2), (44_100, 1), (37_000, 1)])
def test_played_clips_are_the_given_ones_at_minus_14_lufs(tmp_path, rate: int, channels: int):
    wav = np.stack([0.05 * tone(440 * (c + 1), 2, rate) / 0.3 for c in range(channels)], 1)
    soundfile.write(tmp_path / "clip.wav", wav, rate)
    write_report(
        tmp_path / "r.html", Report("r", clips=[{"a": ReportClip(tmp_path / "clip.wav", "c")}])
    )
    (audio,) = read(tmp_path / "r.html").all("audio")
    heard, heard_rate = sound(audio["src"])
    assert heard_rate == rate and heard.shape == wav.shape
    assert abs(pyloudnorm.Meter(rate).integrated_loudness(heard) + 14) < 0.2
    for c in range(channels):
        peak = np.abs(np.fft.rfft(heard[:, c])).argmax() * rate / len(heard)
        assert abs(peak - 440 * (c + 1)) < 2


def test_mp3_is_a_fraction_of_flac_and_flac_loses_nothing():
    wav = (np.random.default_rng(0).normal(size=(RATE, 1)) * 0.1).clip(-1, 1)
    assert len(audio_uri(wav, RATE)) < 0.6 * len(audio_uri(wav, RATE, lossless=True))
    heard, _ = sound(audio_uri(wav, RATE, lossless=True))
    assert np.abs(heard - wav).max() <= 1.01 / 2**15


def test_without_mp3_in_libsndfile_flac_takes_its_place(monkeypatch):
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"FLAC": ""})
    assert audio_uri(tone()[:, None], RATE).startswith("data:audio/flac;")


def test_a_silent_clip_has_a_picture_and_a_player(tmp_path):
    write_report(
        tmp_path / "r.html", Report("r", clips=[{"a": ReportClip((np.zeros(RATE), RATE), "")}])
    )
    page = read(tmp_path / "r.html")
    assert len(page.all("audio")) == len(page.all("img")) == 1 and "(no text)" in page.text


def test_missing_clips_keep_the_columns_in_line(tmp_path):
    clip = ReportClip((tone(), RATE), "c")
    write_report(tmp_path / "r.html", Report("r", clips=[{"a": clip, "b": clip}, {"b": clip}]))
    page = read(tmp_path / "r.html")
    assert len(page.all("audio")) == 3 and page.text.count("no clip") == 1


def test_an_empty_report_is_a_page_with_its_title(tmp_path):
    write_report(tmp_path / "r.html", Report("nothing yet"))
    page = read(tmp_path / "r.html")
    assert "nothing yet" in page.text and not page.all("section")


def test_figures_unfold_their_protocol(page: Page):
    assert page.text.count("1.25") >= 1 and "1 to 1.5" in page.text
    columns = ["metric", "value", "interval", "num_clips", "protocol"]
    assert [cell["class"] for cell in page.all("td")] == columns
    assert "None" not in page.text, "what is not known is no part of a protocol"


# --- Bad input ------------------------------------------------------------------------------------


def refused(tmp_path: Path, report: Report, name: str = "r.html") -> str:
    said = refusal(write_report, tmp_path / name, report)
    assert not (tmp_path / "r.html").exists()
    return said


def test_bad_input_is_named_in_one_line(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF no audio")

    def cell(**changes) -> Report:
        clip = {"audio": (tone(), RATE), "caption": "c"} | changes
        return Report("r", clips=[{"a": ReportClip(**clip)}])

    assert "broken.wav: unreadable" in refused(tmp_path, cell(audio=tmp_path / "broken.wav"))
    assert "gone.wav: no such file" in refused(tmp_path, cell(audio=tmp_path / "gone.wav"))
    assert "clip 'c' of a: has NaN" in refused(tmp_path, cell(audio=(np.full(RATE, np.nan), RATE)))
    assert "samples of shape (3, 3)" in refused(tmp_path, cell(audio=(np.zeros((3, 3)), RATE)))
    assert "codes of shape (4,)" in refused(tmp_path, cell(codes=np.arange(4)))
    assert "codes must be integers from 0" in refused(tmp_path, cell(codes=np.full((1, 2), -1)))
    assert "codes of shape (1, 2); codes and order are both `k t`" in refused(
        tmp_path, cell(codes=np.ones((1, 2), int), order=np.ones((1, 3), dtype=int))
    )


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, Report("r"), "file/r.html")
    (tmp_path / "folder").mkdir()
    assert "folder: cannot be written" in refused(tmp_path, Report("r"), "folder")


def test_credentials_in_addresses_are_not_shown(tmp_path):
    secret = "http://me:S3CRET@host/a.tar?signature=S3CRET"
    settings = {"data.train": secret, "list": [secret]}
    record = {"metric": "fad/x", "value": 1.0, "reference": secret}
    write_report(tmp_path / "r.html", Report("r", settings, records=[record], notes=[secret]))
    html = (tmp_path / "r.html").read_text()
    assert "S3CRET" not in html and html.count("***@host/a.tar") == 4


def test_the_share_of_clipped_samples_is_shown(tmp_path):
    wav = np.clip(10 * tone(), -1, 1)
    row = {"loud": ReportClip((wav, RATE), "c"), "fine": ReportClip((tone(), RATE), "c")}
    write_report(tmp_path / "r.html", Report("r", clips=[row]))
    shown = read(tmp_path / "r.html").text
    assert f"clipped samples {np.mean(np.abs(wav) == 1):.2%}" in shown
    assert "clipped samples 0.00%" in shown
