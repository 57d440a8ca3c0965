"""What JAX's device can do, and how much of its memory was taken."""

import gc
import platform

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array

from pruner_run.backend import clocked
from pruner_run.memory import clear_resident_peak, resident_peak

_ROUNDS = 10


class JaxProbe:
    """JAX's first device."""

    def __init__(self) -> None:
        self._device = jax.local_devices()[0]
        self.device = {"gpu": "cuda"}.get(self._device.platform, self._device.platform)
        self.name = platform.machine() if self.device == "cpu" else self._device.device_kind
        self.versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        if self.device != "cpu":
            said = self._device.client.platform_version
            self.versions["platform"] = " ".join(said.split())

    def copy_ms(self, size: int) -> float:
        # A mere copy XLA leaves out; in place, so that no call waits for memory to be found.
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        there = [jnp.zeros(size // 4, jnp.float32)]

        def call() -> Array:
            there[0] = add(there[0])
            return there[0]

        return clocked(call, jax.block_until_ready, _ROUNDS)[1]

    def product_ms(self, size: int, dtype: str) -> float:
        keys = jax.random.split(jax.random.key(0))
        left, right = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
        product = jax.jit(jnp.matmul)
        return clocked(lambda: product(left, right), jax.block_until_ready, _ROUNDS)[1]

    def peak_bytes(self) -> dict[str, int]:
        if self.device == "cpu":
            return {"resident": resident_peak()}
        stats = self._device.memory_stats() or {}
        names = {"allocated": "peak_bytes_in_use", "reserved": "peak_pool_bytes"}
        return {ours: stats[theirs] for ours, theirs in names.items() if theirs in stats}

    def clear(self) -> None:
        """Gives back memory; XLA's allocator does not forget its peak."""
        gc.collect()
        if self.device == "cpu":
            clear_resident_peak()


create = JaxProbe
