# SPDX-License-Identifier: Apache-2.0
"""The app: search images and texts by text, image or both, and see what a model reconstructs from the EOS."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

# Read when gradio and datasets are imported, which otherwise report every start and every file that is read.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"

import torch
from PIL import Image

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The app needs gradio, which is not installed: pip install 'cocoa-embed[app]'."
    ) from error

from evaluation.assets import asset_path
from evaluation.encoders import label
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.media import load_image
from modeling_cocoa.sentence_transformer import CocoaTransformer
from trainers.data.collators import DIRECTIONS

from ..demo.demo import BRIDGE_CHECKPOINT, CHECKPOINT, QUERIES
from .index import SearchIndex, describe_other_files, load_images
from .reconstruction import Reconstructor, read_bridge_settings

LOCAL = "127.0.0.1"
HOUR = 3600
EXAMPLES = 4
SHOWN_SIDE = 512
"""Pixels of the longer side of an image on the page; larger ones are scaled down."""
STYLE = """
.gradio-container .main.app { max-width: 1160px; padding: 1.5rem; }
.images .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; }
.images .thumbnail-item img { aspect-ratio: 1; height: auto; padding: 8px; background: white; }
.images .caption-label { position: static; max-width: none; border: 0; white-space: pre-line; }
.images .grid-wrap { height: auto !important; max-height: none; overflow: hidden; }
.images .grid-container { padding-top: 2rem; }
@media (max-width: 700px) { .images .grid-container { grid-template-columns: repeat(2, 1fr); } }
.examples .gallery-item .container { display: flex; align-items: center; gap: 8px; width: auto; max-height: none; }
.examples .gallery-item img { width: 40px; height: 40px; margin: 0; }
"""
"""Captions below the images instead of over them, and small examples."""
GALLERY: dict[str, Any] = {
    "height": "auto",
    "format": "png",
    "object_fit": "contain",
    "allow_preview": False,
    "buttons": [],
    "interactive": False,
    "elem_classes": "images",
}
TABLE: dict[str, Any] = {"datatype": "str", "wrap": True, "interactive": False, "buttons": []}


class Page:
    """
    The functions behind the page's events.

    Args:
        index ([`SearchIndex`]): What is searched.
        reconstructor ([`Reconstructor`], *optional*): Without it, the page only searches.
    """

    def __init__(self, index: SearchIndex, reconstructor: Reconstructor | None = None) -> None:
        self.index = index
        self.reconstructor = reconstructor
        self._files = TemporaryDirectory(prefix="cocoa-app-")
        self._lock = Lock()  # gradio runs events in threads, and a tokenizer serves one at a time

    def search(self, box: dict[str, Any] | None) -> tuple[list[Any], list[Any]]:
        """The nearest images with captions, and the nearest texts with scores."""
        with errors_on_the_page(), self._lock:
            images, texts = self.index.search(read_box(box))
        names = self.index.rows["name"]
        return (
            [(self.image(hit["corpus_id"]), f"{names[hit['corpus_id']]}\n{hit['score']:.3f}") for hit in images],
            [[self.index.texts[hit["corpus_id"]], f"{hit['score']:.3f}"] for hit in texts],
        )

    def reconstruct(self, box: dict[str, Any] | None) -> tuple[list[Any], list[Any]]:
        """Images and texts: original, masked, and reconstructed from each source."""
        with errors_on_the_page(), self._lock:
            found = self.reconstructor(read_box(box))
        images: list[Any] = []
        texts: list[list[str]] = []
        for direction, image, text in found:
            source = " and ".join(DIRECTIONS[direction][0])
            if image is not None:
                images = images or [(image.original, "original"), (image.masked, "masked: all of it")]
                images.append((image.reconstructed, f"reconstructed from {source}"))
            if text is not None:
                texts.append([source, *text])
        return images, texts

    def image(self, index: int) -> Image.Image:
        """An image of the set, scaled down for the page."""
        image = load_image(self.index.rows[index]["image"]).copy()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return image

    def examples(self, queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Queries of a text, an image, and an image with its name."""
        rows = self.index.rows
        boxes = [{"text": query, "files": []} for query in queries]
        for index in spread(range(len(rows))):
            file = Path(self._files.name) / f"{index}.png"
            self.image(index).save(file)
            boxes.append({"text": "", "files": [str(file)]})
        boxes[-1]["text"] = rows[index]["name"]
        return [[box] for box in boxes]


def spread(values: Sequence[Any]) -> Sequence[Any]:
    """A few of some values, from all over them."""
    step = max(1, len(values) // EXAMPLES)
    return values[step // 2 :: step][:EXAMPLES]


def choose(found: list[tuple[str, str]], event: gr.SelectData) -> dict[str, Any]:
    """A found image with its name, as the next query."""
    file, caption = found[event.index]
    return {"text": caption.rpartition("\n")[0], "files": [file]}


def read_box(box: dict[str, Any] | None) -> dict[str, Any]:
    """
    The content of the query box, as a model takes it.

    Raises:
        CocoaInputError: it is empty, or the image cannot be read.
    """
    text, files = (box or {}).get("text") or "", (box or {}).get("files") or []
    query: dict[str, Any] = {}
    if files:
        file = Path(files[0])
        try:
            query["image"] = load_image(file)
        except CocoaInputError as error:  # without the path of the upload
            raise CocoaInputError(error.reason.replace(str(file), file.name)) from error
    if text.strip():
        query["text"] = text
    if not query:
        raise CocoaInputError("there is no query: enter a text, or drop an image.")
    return query


@contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Show an input that cannot be read as a message on the page, escaped, since gradio would render HTML."""
    try:
        yield
    except CocoaInputError as error:
        raise gr.Error(escape(error.reason), print_exception=False) from error


def build_app(
    model: str | os.PathLike,
    *,
    rebuild_model: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    vectors: str | os.PathLike | None = None,
) -> gr.Blocks:
    """
    Load the models, embed the set, and lay out the page.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub name of the checkpoint to search with.
        rebuild_model (`str` or `os.PathLike`, *optional*): A checkpoint of the bridge stage, for reconstructions; by
            default `model`, if it is one. Without either, the page says what is missing.
        images (`str` or `os.PathLike`, *optional*): Folder to search, as in [`load_images`]; by default emoji.
        vectors (`str` or `os.PathLike`, *optional*): Folder in which vectors are kept for the next start.

    Raises:
        OSError, ValueError: a checkpoint or the folder cannot be read, or is of another kind.
    """
    rows = load_images(images)
    encoder = CocoaTransformer(model).to("cuda" if torch.cuda.is_available() else "cpu")
    reconstructor, bridge_model = None, rebuild_model or model
    try:
        read_bridge_settings(bridge_model)
    except ValueError as error:
        if rebuild_model is not None:
            raise
        about = f"{error} Name it with `--rebuild-model` (on a Space: the variable `COCOA_REBUILD_MODEL`)."
    else:
        reconstructor = Reconstructor(bridge_model)
        about = describe_reconstruction(label(str(bridge_model)), reconstructor)
    index = SearchIndex(encoder, rows, encoder.prompts, vectors)
    page = Page(index, reconstructor)
    title, queries = f"{len(index.rows):,} emoji, drawn by Noto.", QUERIES
    if images is not None:
        title = f"{len(index.rows):,} images of the folder `{Path(images).resolve().name}`."
        if unreadable := len(rows) - len(index.rows):
            title += f" {unreadable:,} cannot be read and are left out."
        title, queries = f"{title} {describe_other_files(images, rows)}", spread(index.texts)

    with gr.Blocks(title="CoCoA", delete_cache=(HOUR, 24 * HOUR)) as app:
        gr.Markdown(
            f"# CoCoA: multimodal search\n`{label(str(model))}` embeds a text, an image, or both as one vector. "
            f"It searches {title} Scores are cosine similarities.",
            elem_id="title",
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Enter a text, drop an image, or both",
            file_types=["image"],
            sources=["upload"],
            max_plain_text_length=100_000,
            autofocus=True,
            elem_id="query",
        )
        examples = gr.Row(elem_classes="examples")  # filled below, when their outputs exist
        with gr.Row():
            found_images = gr.Gallery(
                label="Nearest images (click one to search with it)",
                columns=4,
                scale=3,
                min_width=420,
                elem_id="images",
                **GALLERY,
            )
            found_texts = gr.Dataframe(
                label="Nearest texts",
                headers=["text", "cosine"],
                column_widths=["75%", "25%"],
                scale=2,
                min_width=320,
                visible=bool(index.texts),
                elem_id="texts",
                **TABLE,
            )
        gr.Markdown(f"## Reconstruction from the `<EOS>`\n{about}", elem_id="about-reconstruction")
        if reconstructor is not None:
            button = gr.Button("Reconstruct the query", variant="primary", elem_id="reconstruct")
            images = gr.Gallery(
                label="Images",
                columns=5,
                visible=reconstructor.has_images,
                elem_id="reconstructed-images",
                **GALLERY,
            )
            headers = ["source", "original", "masked", "reconstructed"]
            texts = gr.Dataframe(label="Texts", headers=headers, elem_id="reconstructed-texts", **TABLE)
            button.click(page.reconstruct, box, [images, texts], api_name="reconstruct")

        found = [found_images, found_texts]
        box.submit(page.search, box, found, api_name="search")
        chosen = found_images.select(choose, found_images, box, api_visibility="private")
        chosen.then(page.search, box, found, api_visibility="private")
        with examples:
            gr.Examples(page.examples(queries), box, found, page.search, run_on_click=True, label="Try")
    return app


def describe_reconstruction(name: str, reconstructor: Reconstructor) -> str:
    """What the page shows of a checkpoint's reconstructions, in Markdown."""
    ratios = reconstructor.collator
    about = (
        f"`{name}` reads a source that ends with the `<EOS>`. A target is reconstructed from this one token and the "
        f"unmasked rest of the target: {ratios.target_mask_ratio:.0%} of a text's tokens are masked"
    )
    if ratios.source_mask_ratio:
        about += f" ({ratios.source_mask_ratio:.0%} of a source's)"
    if not reconstructor.has_images:
        return about + ". This model reconstructs texts, from themselves or from an image."
    about += ", and an image is masked completely. With an image and a text, each is reconstructed from every source."
    if reconstructor.model.normalize_pixels:
        about += " This model predicts normalized patches, shown with mean grey and constant contrast."
    return about


def serve(
    model: str | os.PathLike | None = None,
    *,
    rebuild_model: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    vectors: str | os.PathLike | None = None,
    port: int | None = None,
    server_name: str = LOCAL,
) -> None:
    """
    Build the app and serve it until it is interrupted.

    Args:
        model (`str` or `os.PathLike`, *optional*): By default the tiny checkpoint that comes with this project, and
            then `rebuild_model` is by default that of its bridge stage.
        rebuild_model, images, vectors (*optional*): As in [`build_app`].
        port (`int`, *optional*): By default the first free one from 7860 on.
        server_name (`str`, defaults to `"127.0.0.1"`): Address to listen on; by default only this machine is served.

    Raises:
        OSError, ValueError: as [`build_app`]; the port is taken.
    """
    if model is None:
        model, rebuild_model = asset_path(CHECKPOINT), rebuild_model or asset_path(BRIDGE_CHECKPOINT)
    build_app(model, rebuild_model=rebuild_model, images=images, vectors=vectors).launch(
        server_name=server_name,
        server_port=port,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size="20mb",
        theme=gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
    )


def main() -> None:
    """Serve as a Space does: models and address come from environment variables."""
    serve(
        os.environ.get("COCOA_MODEL") or None,
        rebuild_model=os.environ.get("COCOA_REBUILD_MODEL") or None,
        server_name=os.environ.get("GRADIO_SERVER_NAME", LOCAL),
    )


if __name__ == "__main__":
    main()
