# SPDX-License-Identifier: Apache-2.0
"""The app: search pictures and texts by words or pictures, and see what a model rebuilds from the EOS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

# Before gradio is imported, which tells its makers of every start otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import torch

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The app needs gradio, which is not installed: pip install 'cocoa-embed[app]'."
    ) from error

from evaluation.assets import asset_path
from evaluation.demo import BRIDGE_CHECKPOINT, CHECKPOINT
from evaluation.encoders import label
from hub_cards.space.index import Found, PictureSet, SearchIndex, read_prompts
from hub_cards.space.rebuilding import Rebuilder, can_rebuild
from modeling_cocoa.heads import find_checkpoint_file
from modeling_cocoa.inputs import CocoaInputError, load_image
from modeling_cocoa.reconstruction import HEADS_FILE
from modeling_cocoa.sentence_transformer import CocoaTransformer
from trainers.collators import DIRECTIONS

LOCAL = "127.0.0.1"
MAX_FILE_SIZE = "20mb"
CAPTION_LENGTH = 100
HOUR = 3600
DAY = 24 * HOUR
SOURCES = {("image",): "the picture", ("text",): "the words", ("image", "text"): "both"}
"""What a direction's source is called on the page."""
STYLE = """
.gradio-container .main.app { max-width: 1160px; padding: 1.5rem; }
#title h1 { margin-bottom: 0.25rem; }
.pictures .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; }
.pictures .thumbnail-item img { aspect-ratio: 1; height: auto; padding: 8px; background: white; }
.pictures .caption-label { position: static; width: 100%; max-width: none; padding: 4px 6px 6px; border: 0;
  text-align: center; white-space: pre-line; overflow-wrap: anywhere; line-height: 1.3; }
.pictures .thumbnail-item.selected { --ring-color: transparent; border-color: var(--border-color-primary); }
.pictures .grid-wrap { height: auto !important; min-height: 8rem; max-height: none; overflow: hidden; }
.pictures .grid-container { padding-top: 2rem; }
@media (max-width: 700px) { .pictures .grid-container { grid-template-columns: repeat(2, 1fr); } }
.texts [role="grid"] * { font-family: var(--font) !important; }
.texts .cell-menu-button { display: none; }
.examples .gallery-item .container { display: flex; align-items: center; gap: 8px; width: auto; max-height: none; }
.examples .gallery-item div { min-width: 0; }
.examples .gallery-item img { width: 40px; height: 40px; margin: 0; }
.examples .gallery-item p:empty { display: none; }
"""
"""Captions under the pictures instead of over them, and examples in one line."""


class Page:
    """
    What the page's events do.

    Args:
        index ([`SearchIndex`]).
        rebuilder ([`Rebuilder`], *optional*).
    """

    def __init__(self, index: SearchIndex, rebuilder: Rebuilder | None = None) -> None:
        self.index = index
        self.rebuilder = rebuilder
        self._files = TemporaryDirectory(prefix="cocoa-app-")
        self._turn = Lock()  # a tokenizer serves one at a time, and gradio runs events in threads

    def search(self, box: dict[str, Any]) -> tuple[list[Any], list[Any], list[int]]:
        """The nearest pictures with their captions, the nearest texts with their scores, and the pictures' places."""
        with said_on_the_page(), self._turn:
            pictures, texts = self.index.search(read_box(box))
        return (
            [(self.index.rows.picture(found.place), caption(found)) for found in pictures],
            [[found.name, f"{found.score:.3f}"] for found in texts],
            [found.place for found in pictures],
        )

    def choose(self, places: list[int], event: gr.SelectData) -> dict[str, Any]:
        """A picture that was found, with its name, as the next thing to ask."""
        return self.box_of(places[event.index], with_name=True)

    def rebuild(self, box: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """Pictures and texts as they are, with what was hidden, and as they were rebuilt, from each source."""
        with said_on_the_page(), self._turn:
            found = self.rebuilder.rebuild(read_box(box))
        pictures: list[Any] = []
        texts: list[list[str]] = []
        for direction, picture, text in found:
            source = SOURCES[DIRECTIONS[direction][0]]
            if picture is not None:
                if not pictures:
                    pictures = [(picture.original, "as it is"), (picture.hidden, "what is hidden: all of it")]
                pictures.append((picture.rebuilt, f"rebuilt from {source}"))
            if text is not None:
                texts.append([source, *text])
        return pictures, texts

    def box_of(self, place: int, *, with_name: bool = False) -> dict[str, Any]:
        """A picture of the set as if it had been dropped into the box."""
        file = Path(self._files.name) / f"{place}.png"
        if not file.exists():
            self.index.rows.picture(place).save(file)
        return {"text": self.index.rows.names[place] if with_name else "", "files": [str(file)]}

    def examples(self) -> list[list[dict[str, Any]]]:
        """Words, pictures, and a picture with its name."""
        words = [{"text": query, "files": []} for query in self.index.rows.queries]
        *places, last = self.index.rows.examples()
        return [[box] for box in (*words, *map(self.box_of, places), self.box_of(last, with_name=True))]


def read_box(box: dict[str, Any] | None) -> dict[str, Any]:
    """
    What was typed and dropped, as a model takes it.

    Raises:
        CocoaInputError: there is nothing, or the picture cannot be read.
    """
    text, files = (box or {}).get("text") or "", (box or {}).get("files") or []
    query: dict[str, Any] = {}
    if files:
        file = Path(files[0])
        try:
            query["image"] = load_image(file)
        except CocoaInputError as error:
            raise CocoaInputError(error.reason.replace(str(file), file.name)) from error
    if text.strip():
        query["text"] = text
    if not query:
        raise CocoaInputError("there is nothing to look for: type words, or drop a picture.")
    return query


@contextmanager
def said_on_the_page() -> Iterator[None]:
    """Within it, an input that cannot be read is said in a line, as text: gradio would render HTML."""
    try:
        yield
    except CocoaInputError as error:
        raise gr.Error(escape(error.reason), print_exception=False) from error


def caption(found: Found) -> str:
    """What stands under a picture that was found."""
    name = found.name if len(found.name) <= CAPTION_LENGTH else found.name[: CAPTION_LENGTH - 1] + "…"
    return f"{name}\n{found.score:.3f}"


def build_app(
    model: str | os.PathLike,
    *,
    rebuild_model: str | os.PathLike | None = None,
    pictures: str | os.PathLike | None = None,
    vectors: str | os.PathLike | None = None,
) -> gr.Blocks:
    """
    Load the models, embed the set, and lay out the page.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub name of the checkpoint to search with.
        rebuild_model (`str` or `os.PathLike`, *optional*): One that the bridge stage saved; by default `model`, where
            it is one. Without either the page says what is missing.
        pictures (`str` or `os.PathLike`, *optional*): Folder to search, with or without a `metadata.csv` of the
            columns `file_name` and `text`; by default the emoji that come with this project.
        vectors (`str` or `os.PathLike`, *optional*): Folder in which vectors are kept for the next start.

    Raises:
        OSError, ValueError: a checkpoint or the folder cannot be read, or is of another kind.
    """
    rows = PictureSet.load(pictures)
    if rebuild_model is None and can_rebuild(model):
        rebuild_model = model
    rebuilder = None if rebuild_model is None else Rebuilder.from_pretrained(rebuild_model)
    encoder = CocoaTransformer(model).to("cuda" if torch.cuda.is_available() else "cpu")
    index = SearchIndex(encoder, rows, read_prompts(model), vectors)
    rows, page = index.rows, Page(index, rebuilder)

    with gr.Blocks(title="CoCoA", analytics_enabled=False, delete_cache=(HOUR, DAY)) as app:
        gr.Markdown(
            f"# CoCoA: words and pictures in one space\n`{label(str(model))}` turns words, pictures and both together "
            f"into one vector each. Searched here: {rows.title}. {rows.left_out} Scores are cosines.",
            elem_id="title",
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Type words, drop a picture, or both",
            file_types=["image"],
            file_count="single",
            sources=["upload"],
            max_plain_text_length=100_000,
            autofocus=True,
            elem_id="query",
        )
        places = gr.State([])
        examples = gr.Row(elem_classes="examples")  # filled below, once there is something that they can run
        with gr.Row():
            found_pictures = gr.Gallery(
                label="Nearest pictures (click one to ask with it)",
                columns=4,
                object_fit="contain",
                height="auto",
                allow_preview=False,
                buttons=[],
                interactive=False,
                scale=3,
                min_width=420,
                elem_id="pictures",
                elem_classes="pictures",
            )
            found_texts = gr.Dataframe(
                label="Nearest texts",
                headers=["text", "cosine"],
                datatype="str",
                column_widths=["75%", "25%"],
                wrap=True,
                interactive=False,
                buttons=[],
                scale=2,
                min_width=320,
                visible=bool(rows.texts),
                elem_id="texts",
                elem_classes="texts",
            )
        gr.Markdown(about_rebuilding(model, rebuild_model, rebuilder), elem_id="about-rebuilding")
        if rebuilder is not None:
            lay_out_rebuilding(page, box)

        found = [found_pictures, found_texts, places]
        box.submit(page.search, box, found, api_name="search")
        chosen = found_pictures.select(page.choose, places, box, api_visibility="private")
        chosen.then(page.search, box, found, api_visibility="private")
        with examples:
            gr.Examples(page.examples(), box, found, page.search, cache_examples=False, run_on_click=True, label="Try")
    return app


def lay_out_rebuilding(page: Page, box: gr.MultimodalTextbox) -> None:
    """The part of the page that shows what is rebuilt of what is in the box."""
    button = gr.Button("Rebuild what is in the box", variant="primary", elem_id="rebuild")
    pictures = gr.Gallery(
        label="Picture",
        columns=5,
        height="auto",
        format="png",
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        interactive=False,
        visible=page.rebuilder.rebuilds_images,
        elem_id="rebuilt-pictures",
        elem_classes="pictures",
    )
    texts = gr.Dataframe(
        label="Words",
        headers=["rebuilt from", "as they are", "hidden", "rebuilt"],
        datatype="str",
        wrap=True,
        interactive=False,
        buttons=[],
        elem_id="rebuilt-texts",
        elem_classes="texts",
    )
    button.click(page.rebuild, box, [pictures, texts], api_name="rebuild")


def about_rebuilding(
    model: str | os.PathLike, rebuild_model: str | os.PathLike | None, rebuilder: Rebuilder | None
) -> str:
    """What one looks at there, or what is missing."""
    title = "## What the `<EOS>` holds\n"
    if rebuilder is None:
        reason = (
            f"has no file `{HEADS_FILE}`, without which nothing can be rebuilt: only the reconstruction stages save it"
            if find_checkpoint_file(model, HEADS_FILE) is None
            else "was not trained last in the bridge stage, which alone teaches to rebuild from the `<EOS>`"
        )
        return title + (
            f"`{label(str(model))}` {reason}. `cocoa train tiny` makes a checkpoint that can, and "
            "`cocoa app --rebuild-model runs/tiny/bridge/final` shows it here (on a Space: the variable "
            "`COCOA_REBUILD_MODEL`)."
        )
    ratios = rebuilder.collator
    about = (
        f"`{label(str(rebuild_model))}` reads a source and closes it with the `<EOS>`. A target is rebuilt from that "
        "one token alone, beside what is left of the target itself: of words "
        f"{ratios.target_mask_ratio:.0%} are hidden"
    )
    if ratios.source_mask_ratio:
        about += f" (of a source's words {ratios.source_mask_ratio:.0%})"
    if rebuilder.rebuilds_images:
        about += (
            ", and an image is hidden completely. With an image and words in the box, each is rebuilt from itself, "
            "from the other, and from both."
        )
    else:
        about += ". With an image and words in the box, the words are rebuilt from themselves and from the image."
    if rebuilder.model.normalize_pixels and rebuilder.rebuilds_images:
        about += (
            " This model was trained to rebuild the pattern of each patch, not its brightness: each is drawn around "
            "grey, at one contrast."
        )
    return title + about


def serve(
    model: str | os.PathLike | None = None,
    *,
    rebuild_model: str | os.PathLike | None = None,
    pictures: str | os.PathLike | None = None,
    vectors: str | os.PathLike | None = None,
    port: int | None = None,
    server_name: str = LOCAL,
) -> None:
    """
    Build the app and serve it until it is interrupted.

    Args:
        model (`str` or `os.PathLike`, *optional*): Defaults to the tiny checkpoint that comes with this project, and
            then `rebuild_model` to that of its bridge stage.
        rebuild_model, pictures, vectors (*optional*): As in [`build_app`].
        port (`int`, *optional*): By default the first that is free from 7860 on.
        server_name (`str`, defaults to `"127.0.0.1"`): Address to listen on; by default this machine alone is served.

    Raises:
        OSError, ValueError: as [`build_app`]; the port is taken.
    """
    if model is None:
        model, rebuild_model = asset_path(CHECKPOINT), rebuild_model or asset_path(BRIDGE_CHECKPOINT)
    app = build_app(model, rebuild_model=rebuild_model, pictures=pictures, vectors=vectors)
    try:
        _, url, _ = app.launch(
            server_name=server_name,
            server_port=port,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=MAX_FILE_SIZE,
            theme=gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=STYLE,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        if port is None:
            raise
        raise OSError(f"The app cannot be served on port {port}; name another, or none to have one chosen.") from error
    print(f"The app is at {url} until it is stopped with Ctrl+C.", flush=True)
    app.block_thread()


def main() -> None:
    """Serve as a Space does: models and address by environment variables."""
    serve(
        os.environ.get("COCOA_MODEL") or None,
        rebuild_model=os.environ.get("COCOA_REBUILD_MODEL") or None,
        server_name=os.environ.get("GRADIO_SERVER_NAME", LOCAL),
    )


if __name__ == "__main__":
    main()
