"""``pfm cache``: show or clear the caches of embeddings and responses."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.text import Text

from pfm.cli.shell import Traceback, app, examples, guarded


class CacheAction(StrEnum):
    """What to do with the caches."""

    show = "show"
    clear = "clear"


@app.command(epilog=examples("pfm cache", "pfm cache clear"))
def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show its size, or delete all that is in it.")] = (
        CacheAction.show
    ),
    traceback: Traceback = False,
) -> None:
    """Show or clear the caches of embeddings and responses.

    They lie in [cyan]PFM_CACHE[/cyan] or the user's cache folder.
    """
    with guarded(traceback) as session:
        from pfm.encoders import EmbeddingCache
        from pfm.generators import ResponseCache

        for stored, what in ((EmbeddingCache(), "embeddings"), (ResponseCache(), "responses")):
            found = f"{len(stored):,} {what}, {stored.size_bytes / 1e6:,.1f} MB, in {stored.folder}"
            if action is CacheAction.clear:
                stored.clear()
                found = f"deleted {found}"
            session.out.print(Text(found), soft_wrap=True)
