"""The app's page: three tabs on a `Studio`, in Gradio."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # type: ignore[import-not-found]

from magnet_train.app.fields import FormField, form_fields, from_form, to_form
from magnet_train.app.players import Clip, clips_html
from magnet_train.app.studio import (
    JUDGES,
    NO_JUDGE,
    Studio,
    edit_options,
    read_options,
)
from magnet_train.cli.edit import EditOptions
from magnet_train.cli.generate import GenerateOptions
from magnet_train.common.errors import UserError, user_error_from
from magnet_train.data.manifest import read_sidecar
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.hints import Hints
from magnet_train.evaluation.page import text

HERE = Path(__file__).parent
RUN_POLL_S = 5.0
"""Time between two checks of a run folder for new validations, in seconds."""
KEYS = (
    "Keys: 1, 2, … switch between clips at the same position, space plays and pauses. The clips "
    "are played at equal loudness."
)
EDIT_KEYS = (
    "Drag on the spectrogram to mark regions; drag an edge to move it. On the focused spectrogram, "
    "← and → move the position, [ and ] mark a region's ends, Delete removes the region there."
)


def serve(studio: Studio, port: int, share: bool) -> None:
    """Serve the page on 127.0.0.1 until interrupted.

    Raises:
        UserError: if the port is in use, or there is no public link.
    """
    os.environ.setdefault("GRADIO_TEMP_DIR", str(studio.out / ".uploads"))
    blocks = Page(studio).blocks
    try:
        blocks.launch(
            share=share,
            server_name="127.0.0.1",
            server_port=port,
            allowed_paths=[str(studio.out)],  # what the page offers for download
            theme=theme(),
            css=(HERE / "app.css").read_text(encoding="utf-8"),
            head=f"<script>{(HERE / 'clip.js').read_text(encoding='utf-8')}</script>",
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {port}: in use; choose another") from error
    if share and not blocks.share_url:
        raise UserError("--share: Gradio's servers give no public link; omit it")
    print(
        "\n".join(f"open {url}" for url in (blocks.local_url, blocks.share_url) if url), flush=True
    )
    blocks.block_thread()


def theme() -> Any:
    """Gradio's default theme with the system's fonts and more contrast."""
    names = ("block_info_text_color", "body_text_color_subdued")
    light = {name: "*neutral_600" for name in names}
    dark = {f"{name}_dark": "*neutral_300" for name in names}
    base = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    colours: Any = light | dark
    return base.set(**colours)


def status(message: str, bad: bool = False) -> str:
    """HTML of a line of status."""
    kind = 'class="status bad" role="alert"' if bad else 'class="status" role="status"'
    return f"<div {kind}>{text(message)}</div>"


def widget(field: FormField, value: Any = None, **look: Any) -> Any:
    """The Gradio component of a setting."""
    look = {"label": field.name, "info": field.help, "min_width": 200} | look
    if field.kind == "bool":
        return gr.Checkbox(bool(value), **look)
    if field.kind in ("int", "float"):
        return gr.Number(value, precision=0 if field.kind == "int" else None, **look)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=value, **look)
    return gr.Textbox(value or "", **look)


def widgets(settings: type, values: dict[str, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    """Components by name for some settings of a dataclass (default: all), not rendered yet."""
    shown = {field.name: field for field in form_fields(settings)}
    form = to_form(values)
    return {n: widget(shown[n], form.get(n), render=False) for n in names or shown}


class Page:
    """The page; `blocks` is what Gradio serves."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.decoding = widgets(DecodingConfig, asdict(studio.decoding_settings(studio.model)))
        self.options = widgets(GenerateOptions, {"seed": 0}, ("duration_s", "seed", "loop", "lora"))
        self.blocks = gr.Blocks(
            title="magnet_train", analytics_enabled=False, delete_cache=(3600, 86400)
        )
        with self.blocks, gr.Column(elem_id="page"):
            with gr.Tab("Generate"):
                self.prompt = gr.Textbox("", label="prompt", lines=2, info="Empty = no text.")
                self.decoding["negative_prompt"].render()
                self._generate_tab()
            with gr.Tab("Edit"):
                self._edit_tab()
            with gr.Tab("Runs"):
                self._runs_tab()
            with gr.Accordion("Model, decoding settings, presets", open=False):
                self._settings()
            self._connect_generate()
            self._connect_edit()
            self.blocks.unload(self._leave)

    def _leave(self, request: gr.Request) -> None:
        self.studio.cancel(str(request.session_hash))

    def _on(
        self, event: Any, call: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Call a function with the browser tab and the inputs at an event.

        Its result, or each result of its iterator, goes to the outputs. The first output shows
        errors.
        """

        def handler(request: gr.Request, *values: Any) -> Iterator[Any]:
            try:
                result = call(str(request.session_hash), *values)
                yield from result if isinstance(result, Iterator) else [result]
            except Exception as error:
                mistake = user_error_from(error)
                if mistake is None:
                    raise
                shown = status(str(mistake), bad=True)
                yield (shown, *[gr.skip()] * (len(outputs) - 1)) if len(outputs) > 1 else shown

        event(
            handler,
            list(inputs),
            list(outputs),
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )

    def _cancel(self, out: Any) -> None:
        button = gr.Button("Cancel", min_width=100)
        self._on(button.click, lambda session: status(self.studio.cancel(session)), [], [out])

    # --- generate ---------------------------------------------------------------------------------

    @property
    def _form(self) -> list[Any]:
        return [self.prompt, self.model, *self.options.values(), *self.decoding.values()]

    def _options(self, values: Sequence[Any]) -> dict[str, Any]:
        """Options of `generate` from the form."""
        prompt, model, duration, seed, loop, lora, *decoding = values
        return {
            "prompt": [prompt] if prompt.strip() else [],
            "unconditional": not prompt.strip(),
            "duration_s": from_form(GenerateOptions, {"duration_s": duration})["duration_s"],
            "seed": int(seed or 0),
            "loop": loop,
            "checkpoint": model or "",
            "lora": lora.split(),
            "decoding": self._decoding(decoding),
        }

    def _decoding(self, values: Sequence[Any]) -> dict[str, Any]:
        return from_form(DecodingConfig, dict(zip(self.decoding, values, strict=True)))

    def _to_form(self, options: dict[str, Any]) -> list[Any]:
        """The form from options: the reverse of `_options`."""
        decoding = to_form(asdict(DecodingConfig.from_dict(options["decoding"])))
        return [
            next(iter(options.get("prompt") or []), ""),
            options.get("checkpoint", self.studio.model),
            to_form({"duration_s": options.get("duration_s")})["duration_s"],
            options.get("seed", 0),
            options.get("loop", False),
            " ".join(options.get("lora") or []),
            *(decoding[name] for name in self.decoding),
        ]

    def _generate_tab(self) -> None:
        with gr.Row():
            for name in ("duration_s", "seed", "loop"):
                self.options[name].render()
            self.takes = gr.Number(2, label="takes", info="With consecutive seeds.", precision=0)
            self.judge = gr.Dropdown(
                [NO_JUDGE, *JUDGES], value=JUDGES[0], label="score", info="Judge of each take."
            )
        with gr.Row():
            self.start = gr.Button("Generate", variant="primary", min_width=100)
            self.out = gr.HTML()
            self._cancel(self.out)
        self.picture, self.shown = gr.HTML(), gr.HTML()
        gr.HTML(f'<p class="faint">{KEYS}</p>')
        self.files = gr.File(label="Audio and JSON", visible=False, interactive=False)

    def _connect_generate(self) -> None:
        inputs = [self.takes, self.judge, *self._form]
        outputs = [self.out, self.picture, self.shown, self.files]
        self._on(self.start.click, self._generate, inputs, outputs)

    def _generate(self, session: str, takes: Any, judge: str, *values: Any) -> Iterator[Any]:
        clips: list[Clip] = []
        updates = self.studio.generate(session, int(takes or 1), judge, self._options(values))
        for update in updates:
            if update.clip:
                clips.append(update.clip)
            shown = clips_html(clips, "takes") if update.clip or not clips else gr.skip()
            yield status(update.message), update.picture, shown, _files(clips)

    # --- model, settings, presets -----------------------------------------------------------------

    def _settings(self) -> None:
        studio = self.studio
        out = gr.HTML()
        with gr.Row():
            self.model = gr.Dropdown(
                studio.access.list_models(),
                value=studio.model,
                label="model",
                info="Release, checkpoint or run folder; edit uses it too.",
                allow_custom_value=True,
            )
            self.options["lora"].render()
        with gr.Row():
            preset = gr.Dropdown(studio.presets(), value=None, label="preset", info="Load it.")
            name = gr.Textbox("", label="name", info="For a new preset.")
            save = gr.Button("Save preset", min_width=100)
        note = gr.File(
            label="JSON next to a clip: load its settings", height=110, elem_id="settings"
        )
        with gr.Row():
            for setting, component in self.decoding.items():
                if setting != "negative_prompt":
                    component.render()

        def choose(session: str, model: str) -> list[Any]:
            values = to_form(asdict(studio.decoding_settings(model)))
            return [status(f"Settings of {model}"), *(values[name] for name in self.decoding)]

        def keep(session: str, name: str, *values: Any) -> list[Any]:
            path = studio.save_preset(name, self._options(values))
            return [status(f"Saved: {path}"), gr.update(choices=studio.presets())]

        def use(session: str, name: str | None) -> list[Any]:
            form = self._to_form(studio.preset(name)) if name else [gr.skip()] * len(self._form)
            return [status(f"Settings of {name}" if name else ""), *form]

        def read(session: str, file: str | None) -> list[Any]:
            if file is None:
                return [gr.skip()] * (len(self._form) + 1)
            form = self._to_form(read_options(Path(file)))
            return [status(f"Settings of {Path(file).name}"), *form]

        self._on(self.model.input, choose, [self.model], [out, *self.decoding.values()])
        self._on(save.click, keep, [name, *self._form], [out, preset])
        self._on(preset.input, use, [preset], [out, *self._form])
        self._on(note.change, read, [note], [out, *self._form])

    # --- edit -------------------------------------------------------------------------------------

    def _edit_tab(self) -> None:
        self.history = gr.State([])
        with gr.Row():
            self.upload = gr.File(label="Recording", height=120, elem_id="recording")
            with gr.Column():
                self.path = gr.Textbox("", label="or its path", info="In an allowed folder.")
                self.open = gr.Button("Open", min_width=100)
        self.edit_out, self.edit_picture, self.edited = gr.HTML(), gr.HTML(), gr.HTML()
        self.regions = gr.Textbox(
            "", label="regions", elem_id="regions", info=f"START:END in seconds. {EDIT_KEYS}"
        )
        self.edit_prompt = gr.Textbox("", label="prompt", lines=2)
        with gr.Row():
            self.edit_seed = gr.Number(0, label="seed", info="Raised after each edit.", precision=0)
            names = ("loop_s", "bars", "bpm", "to_s")
            self.lengths = widgets(EditOptions, {}, names)
            for component in self.lengths.values():
                component.render()
        with gr.Accordion("Keep codes of the regions as hints", open=False), gr.Row():
            self.hints = widgets(Hints, asdict(Hints()))
            for component in self.hints.values():
                component.render()
        with gr.Row():
            self.edits = {
                "regenerate": gr.Button("Regenerate regions", variant="primary", min_width=140),
                "loop": gr.Button("Loop", min_width=80),
                "extend": gr.Button("Extend to to_s", min_width=100),
            }
            self.undo = gr.Button("Undo", min_width=80)
            self._cancel(self.edit_out)
        gr.HTML(f'<p class="faint">{KEYS}</p>')
        self.edit_files = gr.File(label="Audio and JSON", visible=False, interactive=False)

    def _connect_edit(self) -> None:
        shown = [self.edit_out, self.history, self.edited, self.edit_files]
        opened = [*shown, self.regions, self.edit_prompt]
        self._on(self.upload.upload, self._open_upload, [self.upload], opened)
        self._on(self.open.click, self._open_path, [self.path], opened)
        self._on(self.undo.click, self._undo, [self.history], shown)
        form = [self.history, self.model, self.options["lora"], self.regions, self.edit_prompt]
        form += [self.edit_seed, *self.lengths.values(), *self.hints.values()]
        for kind, button in self.edits.items():
            self._on(
                button.click,
                lambda session, *values, kind=kind: self._edit(session, kind, *values),
                [*form, *self.decoding.values()],
                [*shown, self.edit_picture, self.regions, self.edit_seed],
            )

    def _open_upload(self, session: str, file: str) -> list[Any]:
        return self._opened(self.studio.add_recording(file), Path(file).name)

    def _open_path(self, session: str, path: str) -> list[Any]:
        file = self.studio.open_recording(path)
        return self._opened(file, file.name)

    def _opened(self, path: Path, name: str) -> list[Any]:
        return [*_shown(f"Opened {name}", [Clip(path, name)]), "", read_sidecar(path)[0]]

    def _undo(self, session: str, history: list[Clip]) -> list[Any]:
        if len(history) < 2:
            raise UserError("nothing to undo")
        return _shown("Undone", history[:-1])

    def _edit(self, session: str, kind: str, history: list[Clip], *values: Any) -> Iterator[Any]:
        if not history:
            raise UserError("no recording; drop one, or open one by its path")
        model, lora, regions, prompt, seed, *rest = values
        lengths, rest = rest[: len(self.lengths)], rest[len(self.lengths) :]
        hints, decoding = rest[: len(self.hints)], rest[len(self.hints) :]
        named = dict(zip(self.lengths, lengths, strict=True))
        options = edit_options(kind, regions, **from_form(EditOptions, named))
        options |= from_form(Hints, dict(zip(self.hints, hints, strict=True)))
        options |= {
            "audio": history[-1].path,
            "prompt": [prompt] if prompt.strip() else [],
            "seed": int(seed or 0),
            "checkpoint": model or "",
            "lora": lora.split(),
            "decoding": self._decoding(decoding),
        }
        for update in self.studio.edit(session, options):
            row = [status(update.message), *[gr.skip()] * 3, update.picture, gr.skip(), gr.skip()]
            if update.clip:
                row[:4] = _shown(update.message, [*history, update.clip])
                row[5:] = ["", int(seed or 0) + 1]
            yield row

    # --- runs -------------------------------------------------------------------------------------

    def _runs_tab(self) -> None:
        seen = gr.State(None)
        with gr.Row():
            run = gr.Dropdown(
                self.studio.access.list_runs(),
                value=None,
                label="run",
                info="Run folder; new validations appear by themselves.",
                allow_custom_value=True,
            )
            steps = gr.Dropdown(
                [], label="steps", info="Empty = the last two validations.", multiselect=True
            )
            prompts = gr.Number(4, label="prompts", precision=0, minimum=1)
        out, shown = gr.HTML(), gr.HTML()
        gr.HTML(f'<p class="faint">{KEYS}</p>')
        inputs, outputs = [run, steps, prompts, seen], [out, steps, shown, seen]
        for event in (run.change, steps.change, prompts.change, gr.Timer(RUN_POLL_S).tick):
            self._on(event, self._watch, inputs, outputs)

    def _watch(
        self, session: str, run: str | None, steps: list[int], prompts: Any, seen: Any
    ) -> Any:
        """Show the validations of a run, if they are not the ones already shown."""
        if not run:
            return [gr.skip()] * 4
        found = self.studio.steps_of_run(run)
        chosen = [step for step in steps or [] if step in found] or found[:2]
        state = run, found, chosen, prompts
        if state == seen:
            return [gr.skip()] * 4
        shown = self.studio.run_html(run, chosen, int(prompts or 1))
        message = f"Steps {', '.join(map(str, sorted(chosen)))} of {run}" if chosen else ""
        return status(message), gr.update(choices=found), shown, state


def _files(clips: Sequence[Clip]) -> Any:
    """The files of generated clips; an opened recording has no JSON of ours."""
    made = [clip for clip in clips if clip.order is not None]
    paths = [str(p) for clip in made for p in (clip.path, clip.path.with_suffix(".json"))]
    return gr.update(value=paths, visible=bool(paths))


def _shown(message: str, history: list[Clip]) -> list[Any]:
    """Status, history, its last two clips, and the files of the last one."""
    views = clips_html(history[:-3:-1], "edit", edits="regions")
    return [status(message), history, views, _files(history[-1:])]
