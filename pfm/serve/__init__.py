"""An OpenAI-compatible proxy that refines the answers of the server behind it.

It needs the extra ``serve``: ``pip install "preference-flow[serve]"``.
"""

try:
    import fastapi  # noqa: F401
    import httpx2  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f'pfm serve lacks {error.name}: pip install "preference-flow[serve]"', name=error.name) from error

from pfm.serve.app import create_app
from pfm.serve.config import ServeConfig, read_settings
from pfm.serve.server import run

__all__ = ["ServeConfig", "create_app", "read_settings", "run"]
