"""The app's page in headless Chromium; needs the extra `app` and playwright with its browser.

CHROMIUM names another executable of the browser.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers_ranks import free_port

from magnet_train.release import SavedModel

pytestmark = pytest.mark.slow
WAIT_MS = 120_000
FLAGS = ("--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio")
SETTINGS = "Model, decoding settings, presets"


def playwright():
    return pytest.importorskip("playwright.sync_api", reason="pip install playwright")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Allowed folder, with a recording and a run."""
    folder = tmp_path_factory.mktemp("app") / "allowed"
    folder.mkdir()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 3 * 16_000)
    soundfile.write(folder / "noise.wav", noise, 16_000)
    add_validation(folder, 5)
    return folder


def add_validation(folder: Path, step: int) -> None:
    clips = folder / "run" / "validation" / f"step_{step:07d}"
    clips.mkdir(parents=True)
    (clips / "00_air.json").write_text(json.dumps({"prompt": f"air of step {step}"}))
    (clips / "00_air.wav").write_bytes((folder / "noise.wav").read_bytes())


def preset(folder: Path, decoding_steps: tuple[int, ...]) -> Path:
    """The JSON of a clip of one second."""
    decoding = asdict(SavedModel.open("demo").decoding) | {"decoding_steps": decoding_steps}
    path = folder / "clip.json"
    options = {"prompt": ["a slow air"], "seed": 3, "duration_s": 1.0, "decoding": decoding}
    path.write_text(json.dumps({"options": options}))
    return path


@pytest.fixture(scope="module")
def url(folder):
    """Address of a running app."""
    pytest.importorskip("gradio", reason="pip install -e '.[app]'")
    playwright()
    port = free_port()
    command = [sys.executable, "-m", "magnet_train", "app", "--port", str(port)]
    command += ["--allow", str(folder), "--out", str(folder.parent / "out"), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None
            yield next(line.split()[1] for line in app.stdout if line.startswith("open "))
        finally:
            app.terminate()


@pytest.fixture(scope="module")
def browser(url):
    with playwright().sync_playwright() as play:
        yield play.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=FLAGS)


@pytest.fixture
def open_page(browser, url):
    """Opens the page in a new browser; no errors may appear in its console."""
    contexts, errors = [], []

    def open_page(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def wait_for_status(page, text: str) -> None:
    page.locator(".status:visible", has_text=text).first.wait_for()


def load_settings(page, path: Path) -> None:
    page.get_by_text(SETTINGS).click()
    page.locator("#settings input[type=file]").set_input_files(path)


def test_dropped_settings_two_takes_and_their_comparison(open_page, folder):
    page = open_page(viewport={"width": 1280, "height": 900})
    wrong = folder / "wrong.json"
    wrong.write_text("{}")
    load_settings(page, wrong)
    wait_for_status(page, "wrong.json: no options in it")
    page.locator("#settings").get_by_label("Clear").click()
    page.locator("#settings input[type=file]").set_input_files(preset(folder, (2, 1)))
    wait_for_status(page, "Settings of clip.json")
    assert page.get_by_label("decoding_steps").input_value() == "2, 1"
    assert page.get_by_label("prompt").first.input_value() == "a slow air"

    page.get_by_role("button", name="Generate", exact=True).click()
    wait_for_status(page, "Done: 2 files saved")
    page.locator("clip-view img.order").nth(1).wait_for()
    players = "[...document.querySelectorAll('clip-view audio')]"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("1")
    page.wait_for_function(f"{players}[0].currentTime > 0.2")
    page.keyboard.press("2")
    page.wait_for_function(f"{players}[0].paused && {players}[1].currentTime > 0.2")
    page.keyboard.press(" ")
    assert page.evaluate(f"{players}.every(audio => audio.paused)")


def test_upload_touch_edit_and_undo_on_a_phone(open_page, folder):
    page = open_page(viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)
    load_settings(page, preset(folder, (2, 1)))
    wait_for_status(page, "Settings of clip.json")
    page.get_by_text(SETTINGS).click()
    page.get_by_role("tab", name="Edit").click()
    upload = page.locator("#recording input[type=file]")
    upload.set_input_files({"name": "bad.wav", "mimeType": "audio/wav", "buffer": b"no audio"})
    wait_for_status(page, "bad.wav: ")
    page.locator("#recording").get_by_label("Clear").click()
    upload.set_input_files(folder / "noise.wav")
    wait_for_status(page, "Opened noise.wav")

    figure = page.locator("clip-view:visible figure")
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    touch = page.context.new_cdp_session(page)
    for kind, x in (("touchStart", 1), ("touchMove", 1.5), ("touchMove", 2), ("touchEnd", None)):
        point = [] if x is None else [{"x": box["x"] + x / 3 * box["width"], "y": box["y"] + 60}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": point})
    regions = page.locator("#regions").locator("input, textarea")
    start, end = map(float, re.fullmatch("(.*):(.*)", regions.input_value()).groups())
    assert abs(start - 1) < 0.1 and abs(end - 2) < 0.1

    page.get_by_role("button", name="Regenerate regions").click()
    wait_for_status(page, "Done: 1 file saved")
    page.locator("clip-view:visible").nth(1).wait_for()
    page.get_by_role("button", name="Undo").click()
    wait_for_status(page, "Undone")
    page.wait_for_function("document.querySelectorAll('clip-view').length == 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_new_validations_of_a_run_appear(open_page, folder):
    page = open_page()
    page.get_by_role("tab", name="Runs").click()
    run = page.get_by_label("run", exact=True)
    run.fill(str(folder / "run"))
    run.press("Enter")
    run.press("Tab")
    page.get_by_text("air of step 5").first.wait_for()
    assert page.locator("clip-view:visible").count() == 1
    add_validation(folder, 10)
    page.get_by_text("step 10").last.wait_for()
    page.locator("clip-view:visible audio").nth(1).wait_for()


def test_two_tabs_reload_and_a_missing_model(open_page, folder):
    first, second = open_page(), open_page()
    load_settings(first, preset(folder, (3_000,)))
    wait_for_status(first, "Settings of clip.json")
    first.get_by_role("button", name="Generate", exact=True).click()
    wait_for_status(first, "Step ")
    load_settings(second, preset(folder, (2, 1)))
    wait_for_status(second, "Settings of clip.json")
    second.get_by_role("button", name="Generate", exact=True).click()
    wait_for_status(second, "Waiting for another generation")
    first.reload()
    wait_for_status(second, "Done: 2 files saved")
    model = second.get_by_label("model", exact=True)
    model.fill("/nowhere/model")
    model.press("Enter")
    wait_for_status(second, "/nowhere/model: outside the allowed folders")


def test_cancel_regions_by_keys_loop_and_extend(open_page, folder):
    page = open_page()
    load_settings(page, preset(folder, (3_000,)))
    wait_for_status(page, "Settings of clip.json")
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_for_status(page, "Step ")
    page.get_by_role("button", name="Cancel").first.click()
    wait_for_status(page, "Cancelled after step ")
    page.locator("#settings").get_by_label("Clear").click()
    page.locator("#settings input[type=file]").set_input_files(preset(folder, (2, 1)))
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(t => t.value == '2, 1')"
    )

    page.get_by_role("tab", name="Edit").click()
    path = page.get_by_label("or its path")
    path.fill(str(folder / "noise.wav"))
    page.get_by_role("button", name="Open", exact=True).click()
    wait_for_status(page, "Opened noise.wav")
    page.locator("clip-view:visible figure").focus()
    for key in ("ArrowRight", "[", "ArrowRight", "ArrowRight", "]"):
        page.keyboard.press(key)
    regions = page.locator("#regions").locator("input, textarea")
    assert regions.input_value() == "0.5:1.5"
    page.get_by_role("button", name="Loop", exact=True).click()
    wait_for_status(page, "Done: 1 file saved")
    seconds = "Number(document.querySelector('clip-view[data-group=edit]').dataset.seconds)"
    page.wait_for_function(f"{seconds} == 1")
    page.get_by_label("to_s").fill("2")
    page.get_by_role("button", name="Extend to to_s").click()
    page.wait_for_function(f"{seconds} == 2")
