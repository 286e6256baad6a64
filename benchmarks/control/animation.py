"""Before and after, side by side: python -m benchmarks.control.animation reacher [--out FILE.gif] [key=value ...].

Fits a method on the pairs of a task (those of the benchmark, if they have been collected), plays one episode of the
reference and one of the chosen policy from the same start, and writes both as one animated picture. The keys are those
of ``python -m benchmarks``, such as ``method=control/dpo`` or ``task.limit=1000``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

__all__ = ["main", "play_frames", "side_by_side"]

_HEIGHT = 260  # pixels of a picture
_TITLE = 30  # pixels above it
_FRAMES = 60  # at most
_KEPT = 150  # pictures of a whole episode, about
_LAST = 8  # how often the last frame is repeated


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, play and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control.animation", description=__doc__)
    parser.add_argument("task", help="what follows pbrl/ in the name of a task, such as reacher")
    parser.add_argument("overrides", nargs="*", help="settings, such as method=control/dpo seed=1")
    parser.add_argument("--out", type=Path, help="where to write; default: <task>.gif in the folder of the task")
    parser.add_argument("--start", type=int, default=0, help="which start of the test")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

    from omegaconf import OmegaConf

    from benchmarks.control.task import ControlTask
    from benchmarks.core.bench import Bench
    from benchmarks.core.config import RunConfig
    from benchmarks.core.schemas import composed
    from benchmarks.methods import make_method
    from benchmarks.tasks import load_task

    chosen = composed(f"task=pbrl/{options.task}", "method=control/flow", *options.overrides)
    settings = cast(RunConfig, OmegaConf.to_object(chosen))
    task = cast(ControlTask, load_task(settings.task, settings.seed))
    method = make_method(settings.method)
    policy = task.learned(method, Bench(settings.encoder, settings.long_texts, settings.seed, settings.progress))
    name = task.config.environment
    played = [play_frames(name, each, task.start(options.start)) for each in (task.reference, policy)]
    out = options.out or Path(task.config.folder) / f"{options.task}.gif"
    side_by_side(played, ["Reference", settings.method.label], out)
    print(f"{out}: reference {played[0][1][-1]:.1f}, {settings.method.label} {played[1][1][-1]:.1f}")
    return 0


def play_frames(name: str, policy: Any, seed: int) -> tuple[list[np.ndarray], list[float]]:
    """Play one episode and give pictures (h, w, 3) uint8 at even steps of it, and the return so far at each of them."""
    from pfm.pbrl import make_env

    env = make_env(name, render_mode="rgb_array")
    _follow(env.unwrapped)
    seen, _ = env.reset(seed=seed)
    policy = policy.bind(env) if hasattr(policy, "bind") else policy
    frames, earned, total = [_picture(env)], [0.0], 0.0
    memory, start, over = None, np.ones(1, dtype=bool), False
    every, step = max((env.horizon or 0) // _KEPT, 1), 0
    while not over:
        action, memory = policy.predict(np.asarray(seen)[None], memory, start, True)
        start = np.zeros(1, dtype=bool)
        seen, reward, terminated, truncated, _ = env.step(action[0])
        total += float(reward)
        over, step = terminated or truncated, step + 1
        if over or step % every == 0:
            frames.append(_picture(env))
            earned.append(total)
    env.close()
    return frames, earned


def side_by_side(
    played: Sequence[tuple[list[np.ndarray], list[float]]], labels: Sequence[str], out: Path, seconds: float = 5.0
) -> None:
    """Write episodes (frames, returns) next to each other as an animated GIF; one that is over keeps its last frame."""
    from PIL import Image, ImageDraw, ImageFont

    longest = max(len(frames) for frames, _ in played)
    times = np.unique(np.linspace(0, longest - 1, min(_FRAMES, longest)).round().astype(int))
    height, width = played[0][0][0].shape[:2]
    font: Any = ImageFont.load_default(size=15)
    pictures = []
    for time in [*times, *[times[-1]] * _LAST]:
        sheet = Image.new("RGB", (len(played) * width, height + _TITLE), "white")
        draw = ImageDraw.Draw(sheet)
        for number, ((frames, earned), label) in enumerate(zip(played, labels, strict=True)):
            at, left = min(int(time), len(frames) - 1), number * width
            sheet.paste(Image.fromarray(frames[at]), (left, _TITLE))
            draw.text((left + 8, _TITLE // 2), label, fill="#222222", font=font, anchor="lm")
            note = f"return {earned[at]:.1f}"
            draw.text((left + width - 8, _TITLE // 2), note, fill="#222222", font=font, anchor="rm")
            if number:
                draw.line((left, 0, left, height + _TITLE), fill="#888888")
        pictures.append(sheet.quantize(40, dither=Image.Dither.NONE))
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(
        out, save_all=True, append_images=pictures[1:], duration=round(1000 * seconds / len(pictures)), loop=0,
        optimize=True,
    )  # fmt: skip


def _follow(simulator: Any) -> None:
    """Look through the camera that runs beside the body, where a MuJoCo model has one."""
    if hasattr(simulator, "mujoco_renderer"):
        mujoco: Any = import_module("mujoco")
        simulator.mujoco_renderer.camera_id = mujoco.mj_name2id(simulator.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


def _picture(env: Any) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(env.render())
    return np.asarray(picture.resize((round(_HEIGHT * picture.width / picture.height), _HEIGHT)))


if __name__ == "__main__":
    sys.exit(main())
