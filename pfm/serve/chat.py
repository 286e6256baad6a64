"""The chat page: a conversation with the refined model, and what people think of its answers."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from fastapi.responses import Response

__all__ = ["chat_page"]


async def chat_page() -> Response:
    """Answer with the page. It asks no other server for anything, and runs no script but its own."""
    page, policy = _page()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def _page() -> tuple[bytes, str]:
    """Return the page with the policy that allows what it holds, by digest."""
    text = (files("pfm.serve") / "chat.html").read_text(encoding="utf-8")
    allowed = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()}'"
            for found in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        )
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy
