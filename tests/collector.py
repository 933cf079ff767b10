"""Python's garbage collector."""

from __future__ import annotations

import gc
import threading

OLDEST = 2


def collect(generation: int = OLDEST) -> None:
    """Collect garbage, however long that takes.

    `gc.collect` does nothing while another thread collects, a client's say.
    """
    collected = False

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal collected
        is_here = threading.get_ident() == here
        if phase == "stop" and is_here and info["generation"] >= generation:
            collected = True

    here = threading.get_ident()
    gc.callbacks.append(note)
    try:
        while not collected:
            gc.collect(generation)
    finally:
        gc.callbacks.remove(note)
