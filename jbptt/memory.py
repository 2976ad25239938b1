"""How much memory programs may take where nobody says it."""

import os
from typing import Any

import jax


def usual_memory() -> float:
    """Bytes that programs take if nobody says otherwise: 0.8 of a device's, half of the host's."""
    statistics: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return 0.8 * statistics["bytes_limit"]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
