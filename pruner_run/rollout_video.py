"""A film of an episode: what the cameras saw, with the patches lit that the policy last kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pruner_run.data.video import BROWSER_ENCODING, VideoWriter
from pruner_run.kept_bits import kept_patches
from pruner_run.picture import CELL, INK, PAPER, light_up
from pruner_run.simulation.environment import EnvironmentSpec, Observation, Step

_CAPTION = 32  # pixels below the images


class Film:
    """An mp4 file, a frame a step, the cameras side by side. Use it as a context."""

    def __init__(self, path: Path, spec: EnvironmentSpec) -> None:
        """Opens the file; `spec` is the environment's."""
        size = {"height": CELL + _CAPTION, "width": CELL * len(spec.cameras)}
        self._video = VideoWriter(path, fps=spec.fps, encoding=BROWSER_ENCODING, **size)
        self._spec = spec
        self._kept: Mapping[str, np.ndarray] = {}
        self._answer, self._steps = "", 0
        self._start: Observation | None = None

    def begin(self, observation: Observation) -> None:
        self._start = observation  # drawn once the policy has chosen among its patches

    def answered(self, answer: Mapping[str, Any]) -> None:
        self._kept = kept_patches(answer)
        if "pruning" in answer:
            pruning = answer["pruning"]
            self._answer = f"{pruning['kept_total']} of {pruning['patches']} patches kept"

    def see(self, step: Step) -> None:
        if self._start is not None:
            self._draw(self._start, success=False)
            self._start = None
        assert step.observation is not None
        self._steps += 1
        self._draw(step.observation, success=step.success)

    def __enter__(self) -> "Film":
        return self

    def __exit__(self, *_: object) -> None:
        self._video.close()

    def _draw(self, observation: Observation, *, success: bool) -> None:
        size = (CELL * len(self._spec.cameras), CELL + _CAPTION)
        frame = Image.new("RGB", size, PAPER)
        for place, camera in enumerate(self._spec.cameras):
            frame.paste(self._lit(observation, camera), (place * CELL, 0))
        words = [f"{self._steps / self._spec.fps:.1f} s", observation["prompt"], self._answer]
        text = "   ".join(filter(None, [*words, "success" if success else ""]))
        ImageDraw.Draw(frame).text((10, CELL + _CAPTION // 2), text, INK, anchor="lm")
        self._video.add(np.asarray(frame))

    def _lit(self, observation: Observation, camera: str) -> Image.Image:
        image = observation[f"image/{camera}"]
        if camera in self._kept:
            return light_up(image, self._kept[camera])
        return Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)
