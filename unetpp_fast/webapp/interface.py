"""The page itself, made with gradio. It loads nothing from elsewhere, and reports nothing to anybody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError
from ..common.extras import need
from ..experiments import demo
from ..experiments.pictures import HEAT
from ..reports.page import escape
from . import models, segmentation
from .models import Model
from .segmentation import MODES, Opened

EXTRA = "app"
MASKS, DISAGREEMENT = "masks", "disagreement"  # what the overlay shows
SAMPLE = "nuclei/image.png"
MOST_BYTES = "2gb"
MEASURED_MS = 8000.0  # expected for all levels and modes together, up to which they are measured by themselves
# Only from this server, whatever gradio's own page asks for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:"
)
STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
table.times { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
table.times, table.times tr, table.times th, table.times td { border: 0 !important; }
table.times th, table.times td { padding: 5px 8px; text-align: right; }
table.times tr { border-bottom: 1px solid var(--border-color-primary) !important; }
:is(#overlay, #mask) :is(.image-container, .image-frame, img) { width: 100% !important; height: auto !important; }
:is(#overlay, #mask) img { object-fit: contain; max-height: 80vh; image-rendering: pixelated; }
table.times th { color: var(--body-text-color-subdued); font-weight: 500; }
table.times th:first-child, table.times td:first-child { text-align: left; }
table.times td.chosen { background: #d9483b22; box-shadow: inset 0 0 0 2px #d9483b; border-radius: 4px; font-weight: 600; }
table.times + table.times { margin-top: 12px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 6px 0 14px; }
.problem { border-left: 4px solid #d9483b; padding: 6px 12px; }
"""


@dataclass
class Session:
    """What one visitor looks at."""

    model: Model | None
    opened: Opened | None = None
    problem: str = ""
    mode: str = "accurate"
    level: int = 1
    plane: int = 0
    view: str = MASKS
    path: Path | None = field(default=None, repr=False)


class App:
    """The events of the page: each takes a session, changes it and returns what the page shows.

    Args:
        model: the first model, or None.
        device, dtype: for models that are chosen on the page.
        choose: whether a visitor may name models, which are files and folders of this machine, or names on the Hub.
    """

    def __init__(self, model: Model | None, device: torch.device, dtype: str, choose: bool = True):
        self.model, self.device, self.dtype, self.choose = model, device, dtype, choose

    def begin(self) -> Session:
        """The session of a new visitor."""
        return Session(self.model, level=self.model.levels[-1] if self.model else 1)

    def open(self, session: Session, path: str | None) -> Session:
        """Reads a file; a mistake is kept as the session's problem."""
        session.opened, session.problem, session.plane = None, "", 0
        session.path = Path(path) if path else None
        if path and session.model is None:
            session.problem = "Choose a model first."
        elif path:
            try:
                session.opened = segmentation.open_file(session.model, Path(path), Path(path).name)
                session.plane = session.opened.planes // 2
            except InputError as error:
                session.problem = str(error)
        return session

    def choose_model(self, session: Session, place: str) -> Session:
        """Loads a model and looks at the same file with it."""
        try:
            if not self.choose:
                raise InputError("this page has one model")
            if not place.strip():
                raise InputError("give the folder of a training or cross-validation, a checkpoint, or owner/name on the Hub")
            return self._use(session, models.load([place.strip()], self.device, self.dtype))
        except InputError as error:
            session.problem = str(error)
            return session

    def train(self, session: Session) -> Session:
        """Trains a small model on the sample."""
        return self._use(session, models.train_on_sample(self.device))

    def _use(self, session: Session, model: Model) -> Session:
        session.model, session.level, session.view = model, model.levels[-1], MASKS
        return self.open(session, str(session.path) if session.path else None)

    def look(
        self, session: Session, level: float, mode: str, plane: float, view: str = MASKS
    ) -> tuple[Session, Any, Any, str, str]:
        """The overlay and the mask that are chosen, the table of times, and a line about what is shown."""
        shown, several = session.opened, session.model is not None and len(session.model.members) > 1
        session.level, session.mode, session.plane = int(level), mode, int(plane)
        session.view = view if several else MASKS
        if shown is None:
            return session, None, None, times(session), status(session)
        try:
            session.plane = min(session.plane, shown.planes - 1)
            chosen = (mode, session.level, session.plane)
            overlay = (shown.heat if session.view == DISAGREEMENT else shown.overlay)(*chosen)
            mask = shown.mask(*chosen)
        except InputError as error:
            session.problem = str(error)
            return session, None, None, times(session), status(session)
        return session, overlay, mask, times(session), status(session)

    def measure(self, session: Session) -> Iterator[tuple[Session, str]]:
        """Predicts by every level and mode that was not yet, the fast ones first, and shows the times as they come."""
        yield session, times(session)  # without a result gradio would empty the table
        shown = session.opened
        if shown is None or not shown.times or session.problem:
            return
        cost = max(map(sum, shown.times.values())) * 2 * len(shown.model.levels) * 1.5
        if cost > MEASURED_MS:
            return
        for level in shown.model.levels:
            for mode in MODES:
                if (mode, level) not in shown.times:
                    try:
                        shown.probabilities(mode, level, session.plane)
                    except InputError:
                        return
                    yield session, times(session)


def times(session: Session) -> str:
    """The table of levels: parameters, and milliseconds of both modes as far as they are known; below it that of the
    members, if there are several, in the mode and level that are chosen."""
    if session.model is None:
        return ""
    taken = session.opened.times if session.opened else {}
    now = (session.mode, session.level)
    rows = []
    for level in session.model.levels:
        cells = ""
        for mode in MODES:
            chosen = ' class="chosen"' if (mode, level) == now else ""
            cells += f"<td{chosen}>{_duration(sum(taken.get((mode, level), [])))}</td>"
        rows.append(f"<tr><td>L{level}</td><td>{session.model.parameters(level):,}</td>{cells}</tr>")
    found = _table("<th>level</th><th>parameters</th><th>fast</th><th>accurate</th>", rows)
    if len(session.model.members) == 1 or now not in taken:
        return found
    members = zip(session.model.members, taken[now], strict=True)
    rows = [f"<tr><td>{escape(name)}</td><td>{_duration(ms)}</td></tr>" for (name, _), ms in members]
    rows.append(f"<tr><td>in sum</td><td>{_duration(sum(taken[now]))}</td></tr>")
    return found + _table(f"<th>member</th><th>L{session.level}, {session.mode}</th>", rows)


def _table(head: str, rows: list[str]) -> str:
    return f'<table class="times"><tr>{head}</tr>{"".join(rows)}</table>'


def _duration(ms: float) -> str:
    if not ms:
        return ""
    return f"{ms / 1e3:.1f} s" if ms >= 1e4 else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def status(session: Session) -> str:
    """A problem, or the image and how much of it is foreground."""
    if session.problem:
        return f'<div class="problem" role="alert">{escape(session.problem)}</div>'
    shown = session.opened
    if session.model is None:
        return "<p>No model yet: train a small one on the sample, or name one below.</p>"
    if shown is None:
        return "<p>Drop an image or a volume, or take the sample.</p>"
    size = " x ".join(map(str, shown.source.shape))
    plane = f", plane {session.plane}" if shown.planes > 1 else ""
    note = f"; {escape(shown.note)}" if shown.note else ""
    chosen = (session.mode, session.level, session.plane)
    if session.view == DISAGREEMENT:
        apart = shown.disagreement(*chosen)
        found = f"where the members' probabilities lie {apart.max():.2f} apart; {apart.mean():.3f} in the mean"
        legend = f" {_patch(HEAT)}{found}"
    else:
        names = zip(session.model.classes, session.model.colours, shown.masks(*chosen), strict=True)
        shares = [f" {_patch(colour)}{escape(name)} {mask.mean():.1%}" for name, colour, mask in names]
        legend = "".join(shares) + " of the pixels"
    return f'<p class="legend">{escape(shown.name)}, {size}{plane}{note}:{legend}</p>'


def _patch(colour: Iterable[float]) -> str:
    return f'<i style="background:rgb({",".join(str(int(value)) for value in colour)})"></i>'


def _controls(gr: Any, now: Session) -> tuple[Any, ...]:
    """The session, and what its model and image make of the controls."""
    model, shown = now.model, now.opened
    levels = model.levels if model else (1, 4)
    planes = shown.planes if shown else 1
    return (
        now,
        f"<p>{escape(model.describe())}</p>" if model else "",
        gr.update(visible=model is None),
        gr.update(minimum=levels[0], maximum=levels[-1], value=now.level, visible=len(levels) > 1 and bool(model)),
        gr.update(visible=len(levels) > 1 and bool(model)),
        gr.update(maximum=max(planes - 1, 1), value=now.plane, visible=planes > 1),
        gr.update(value=now.view, visible=bool(model) and len(model.members) > 1),
    )


def build(app: App) -> Any:
    """The page as gradio's Blocks.

    Raises:
        InputError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    gr = need("gradio", EXTRA)
    with gr.Blocks(title="UNet++", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(app.begin)
        gr.Markdown("# UNet++")
        about = gr.HTML()
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                file = gr.File(label="Image or volume", height=130, elem_id="file")
                sample = gr.Button("Take the sample", elem_id="sample")
                train = gr.Button("Train a small model on the sample", variant="primary", elem_id="train")
                level = gr.Slider(1, 4, 4, step=1, label="Level, L1 is the smallest network", elem_id="level")
                mode = gr.Radio(
                    ["accurate", "fast"], value="accurate", label="Mode", elem_id="mode",
                    info="accurate: the mean over the heads up to the level; fast: its head alone",
                )  # fmt: skip
                view = gr.Radio(
                    [MASKS, DISAGREEMENT], value=MASKS, label="Overlay", visible=False, elem_id="view",
                    info="disagreement: how far the probabilities of the members lie apart",
                )  # fmt: skip
                plane = gr.Slider(0, 1, 0, step=1, label="Plane", visible=False, elem_id="plane")
                table = gr.HTML(elem_id="times")
            with gr.Column(scale=2, min_width=480):
                line = gr.HTML(elem_id="status")
                with gr.Row():
                    shown = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                    overlay = gr.Image(label="Overlay", elem_id="overlay", **shown)
                    mask = gr.Image(label="Mask", elem_id="mask", **shown)
        with gr.Accordion("Another model", open=app.model is None, visible=app.choose):
            place = gr.Textbox(
                label="Model", elem_id="place", lines=1, max_lines=1,
                placeholder="the folder of a training or cross-validation, a UNet++'s checkpoint, or owner/name on the Hub",
            )  # fmt: skip
            choose = gr.Button("Load", elem_id="choose")

        widgets = [session, about, train, level, mode, plane, view]
        results = [session, overlay, mask, table, line]
        one = {"concurrency_limit": 1, "concurrency_id": "compute"}  # models compute one after the other
        chosen = [session, level, mode, plane, view]

        def then_show(event: Any) -> Any:
            return event.then(app.look, chosen, results, show_progress_on=[overlay], **one).then(
                app.measure, [session], [session, table], show_progress="hidden", **one
            )

        def first(function: Any) -> Any:
            return lambda *arguments: _controls(gr, function(*arguments))

        measuring = [
            then_show(page.load(first(lambda now: now), [session], widgets)),
            then_show(file.upload(first(app.open), [session, file], widgets, **one)),
            then_show(file.clear(first(lambda now: app.open(now, None)), [session], widgets)),
            then_show(train.click(first(app.train), [session], widgets, show_progress_on=[train], **one)),
            then_show(choose.click(first(app.choose_model), [session, place], widgets, **one)),
        ]
        taken = sample.click(lambda: str(demo.example(SAMPLE)), None, [file])
        measuring.append(then_show(taken.then(first(app.open), [session, file], widgets, **one)))
        for widget in (level, mode, plane, view):
            stop = widget.input(lambda: None, None, None, trigger_mode="always_last", queue=False, cancels=list(measuring))
            then_show(stop)
    return page


def launch(app: App, host: str, port: int, browser: bool = False, wait: bool = True) -> tuple[Any, str]:
    """Serves the page.

    Args:
        host: 127.0.0.1 for this machine alone. browser: open it there. wait: until it is interrupted.

    Returns:
        The page and its address.

    Raises:
        InputError: gradio is not installed, or the port is taken.
    """
    page = build(app)
    gr = need("gradio", EXTRA)
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue=gr.themes.colors.red
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # gradio's own are hard to read
    try:
        _, address, _ = page.queue().launch(
            server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False,
            theme=theme, css=STYLE, footer_links=[], ssr_mode=False, max_file_size=MOST_BYTES, show_error=True,
            allowed_paths=[str(demo.example(SAMPLE).parent)], app_kwargs={"middleware": [_policy()]},
        )  # fmt: skip
    except (OSError, OverflowError) as error:  # the latter: no port has this number
        raise InputError(f"the port {port} of {host} cannot be used: choose another --port") from error
    if wait:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page, address


def _policy() -> Any:
    """What a browser may load for the page."""
    middleware = need("starlette.middleware", EXTRA).Middleware

    class Policy:
        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def with_policy(message: dict) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, with_policy if scope["type"] == "http" else send)

    return middleware(Policy)
