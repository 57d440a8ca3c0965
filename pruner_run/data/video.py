"""Frames in and out of mp4 files, with PyAV alone (it brings its own FFmpeg).

Each thread keeps the files it read last open, and nobody else knows of them: readers can be
pickled, forked and threaded.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from jaxtyping import UInt8

os.environ.setdefault("SVT_LOG", "1")  # errors only; the AV1 encoder greets on stderr otherwise


@dataclass(frozen=True)
class Encoding:
    """How frames are compressed. The defaults are LeRobot's.

    Attributes:
        codec: FFmpeg's name of the encoder, "libsvtav1" or "libx264".
        gop: Frames from one key frame to the next. A random read decodes up to that many.
        crf: Constant rate factor: higher is smaller and worse.
        pixel_format: "yuv420p" halves the colour's resolution; height and width must be even.
    """

    codec: str = "libsvtav1"
    gop: int = 2
    crf: int = 30
    pixel_format: str = "yuv420p"

    def info(self, shape: tuple[int, ...], fps: int) -> dict[str, Any]:
        """What LeRobot's info.json says of a video of shape [H, W, 3]."""
        return {
            "video.height": shape[0],
            "video.width": shape[1],
            "video.codec": {"libsvtav1": "av1", "libx264": "h264"}.get(self.codec, self.codec),
            "video.pix_fmt": self.pixel_format,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        }


LEROBOT_ENCODING = Encoding()
BROWSER_ENCODING = Encoding(codec="libx264", gop=25, crf=23)  # what every browser plays

FEW_FRAMES = 8  # up to which a read is of single frames, and the file stays open
KEPT_OPEN = 6  # files a thread

_local = threading.local()


class VideoWriter:
    """An mp4 file being written, frame after frame."""

    def __init__(self, path: Path, *, fps: int, height: int, width: int, encoding: Encoding):
        if height % 2 or width % 2:
            raise ValueError(f"{path}: expected even height and width, got {height}x{width}")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"g": str(encoding.gop), "crf": str(encoding.crf)}
        self._container = av.open(str(path), "w")
        stream = self._container.add_stream(encoding.codec, rate=fps, options=options)
        self._stream = cast(av.VideoStream, stream)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = encoding.pixel_format
        self.frames = 0
        self.bytes = 0

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Appends one RGB frame."""
        self._mux(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
        self.frames += 1

    def close(self) -> None:
        """Writes what the encoder still holds, and the file's index."""
        self._mux(None)
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self.bytes += packet.size
            self._container.mux(packet)


def read_frames(
    path: Path, *, start: float, count: int, fps: float
) -> UInt8[np.ndarray, "T H W 3"]:
    """Consecutive frames of a video.

    Args:
        path: An mp4 file.
        start: Time of the first frame, seconds.
        count: How many frames.
        fps: Frames a second; every frame has to lie within a quarter of a frame of its time.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no video, has no frame at one of the times, or a damaged one.
    """
    images = []
    try:
        with _open_for(path, count) as container:
            for time, frame in _decode_from(container, path, start):
                wanted = start + len(images) / fps
                if time < wanted - 0.25 / fps:
                    continue  # between the key frame and the first one wanted
                if time > wanted + 0.25 / fps:
                    found = f"found {time:.4f} s"
                    raise ValueError(f"{path}: expected a frame at {wanted:.4f} s, {found}")
                if frame.is_corrupt:  # FFmpeg fills in what it cannot read
                    raise ValueError(
                        f"{path}: expected a frame at {wanted:.4f} s, found it damaged"
                    )
                images.append(frame.to_ndarray(format="rgb24"))
                if len(images) == count:
                    return np.stack(images)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a video, found no file") from None
    except av.FFmpegError as error:
        raise ValueError(f"{path}: expected a video, found what FFmpeg cannot read") from error
    raise ValueError(f"{path}: expected {count} frames from {start:.4f} s, found {len(images)}")


def _decode_from(
    container: InputContainer, path: Path, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames and their times, from the last key frame at or before a time."""
    if not container.streams.video:
        raise ValueError(f"{path}: expected a video stream, found none")
    # the tenth of a millisecond is for a key frame that lies at `start` but for rounding
    container.seek(round((start + 1e-4) * av.time_base))
    for frame in container.decode(video=0):
        assert frame.time is not None, "every frame in an mp4 has a time"
        yield frame.time, frame


@contextlib.contextmanager
def _open_for(path: Path, count: int) -> Iterator[InputContainer]:
    """The file, open: for few frames one that stays open, for many one that uses all cores.

    Reading a file's index can take longer than the frame that is looked for, and starting threads
    for one frame does. The file is opened anew where it has changed, or in a process that was
    forked, which would share its place in the file; and after an error.
    """
    if count > FEW_FRAMES:
        with av.open(str(path)) as container:
            yield container
        return
    kept: OrderedDict[tuple, InputContainer] = _local.__dict__.setdefault("kept", OrderedDict())
    key = (path, path.stat().st_mtime_ns, os.getpid())
    container = kept.pop(key, None) or _open_single_threaded(path)
    try:
        yield container
    except BaseException:
        container.close()
        raise
    kept[key] = container
    while len(kept) > KEPT_OPEN:
        kept.popitem(last=False)[1].close()


def _open_single_threaded(path: Path) -> InputContainer:
    container = av.open(str(path))
    for stream in container.streams.video:
        stream.thread_type = "NONE"
    return container
