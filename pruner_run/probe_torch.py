"""What PyTorch's device can do, and how much of its memory was taken."""

import gc
import platform
from typing import Any

import torch

from pruner_run.backend import clocked
from pruner_run.memory import clear_resident_peak, resident_peak

_ROUNDS = 10


class TorchProbe:
    """The GPU where there is one, or else the CPU."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self.device = "cuda" if self._on_gpu else "cpu"
        self.name = torch.cuda.get_device_name() if self._on_gpu else platform.machine()
        self.versions = {"torch": str(torch.__version__)}
        if self._on_gpu:
            self.versions["cuda"] = str(torch.version.cuda)
            self.versions["cudnn"] = str(torch.backends.cudnn.version())

    def copy_ms(self, size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return clocked(lambda: target.copy_(source), self._finish, _ROUNDS)[1]

    def product_ms(self, size: int, dtype: str) -> float:
        left, right = torch.randn(
            2, size, size, device=self.device, dtype=getattr(torch, dtype)
        ).unbind()
        return clocked(lambda: left @ right, self._finish, _ROUNDS)[1]

    def peak_bytes(self) -> dict[str, int]:
        if not self._on_gpu:
            return {"resident": resident_peak()}
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }

    def clear(self) -> None:
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            clear_resident_peak()

    def _finish(self, result: Any) -> Any:
        if self._on_gpu:
            torch.cuda.synchronize()
        return result


create = TorchProbe
