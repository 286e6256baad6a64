"""``pfm cache``: show or clear what is kept between runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import app, examples


class CacheAction(StrEnum):
    """What to do with the caches."""

    show = "show"
    clear = "clear"


class Kept(StrEnum):
    """What is kept."""

    embeddings = "embeddings"
    responses = "responses"
    models = "models"


@app.command(epilog=examples("pfm cache", "pfm cache clear", "pfm cache clear --only models"))
def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show the sizes, or delete what is kept.")] = CacheAction.show,
    only: Annotated[
        list[Kept] | None,
        typer.Option(
            help="Embeddings, responses of models behind an API, or models: the unpacked SmolLM2 and the tables of the "
            "static encoder. May be repeated.",
            show_default="all",
        ),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show or clear what is kept between runs: embeddings, responses, unpacked models.

    It lies in [cyan]PFM_CACHE[/cyan] or the user's cache folder. Embeddings and models are made again when they are
    needed; responses are asked, and paid, for again.
    """
    with guarded(traceback, as_json) as session:
        found: list[dict[str, Any]] = []
        for name in dict.fromkeys(only or Kept):
            stored, folders = _stored(name)
            entries, size = len(stored), stored.size_bytes
            if action is CacheAction.clear:
                stored.clear()
                entries, size = entries - len(stored), size - stored.size_bytes
            found.append({"name": name.value, "entries": entries, "bytes": size, "folders": folders})
            told = f"{entries:,} {name}, {size / 1e6:,.1f} MB, in {' and '.join(map(str, folders))}"
            session.out.print(Text(f"deleted {told}" if action is CacheAction.clear else told), soft_wrap=True)
        session.result({"caches": found, "deleted": action is CacheAction.clear})


def _stored(name: Kept) -> tuple[Any, list[Any]]:
    """Return a cache and its folders."""
    if name is Kept.models:
        from pfm._internal.unpacked import UnpackedModels

        models = UnpackedModels()
        return models, models.folders
    from pfm.encoders import EmbeddingCache
    from pfm.generators import ResponseCache

    stored = EmbeddingCache() if name is Kept.embeddings else ResponseCache()
    return stored, [stored.folder]
