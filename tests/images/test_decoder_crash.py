"""A decoder that crashes costs its image and nothing else; real workers, a real SIGSEGV.

test_decoders.py has whole runs, and files that crash their decoder by themselves.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ci2p_cache.errors import ImageDecodeError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.specs import ImageSpec, ViewSpec
from tests.support.pictures import picture

IMAGE = ImageSpec(size=64, resize_side=72, decoder=decoder_name())
PAUSE_SECONDS = 0.005


def workers() -> list[int]:
    """Process ids of the workers that the server of this process has forked."""

    def children(parent: int) -> list[int]:
        tasks = Path(f"/proc/{parent}/task").glob("*/children")
        return [int(pid) for path in tasks for pid in path.read_text().split()]

    def is_server(pid: int) -> bool:
        return Path(f"/proc/{pid}/comm").read_text() == "ci2p-decoder\n"

    # One that ends meanwhile is not listed.
    with contextlib.suppress(OSError):
        servers = [pid for pid in children(os.getpid()) if is_server(pid)]
        return [worker for server in servers for worker in children(server)]
    return []


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def test_a_decoder_that_crashes_makes_its_image_bad_and_the_next_one_is_decoded() -> None:
    # Large enough to be decoded for far longer than the pause.
    large = np.arange(3000 * 4001 * 3, dtype=np.uint32).astype(np.uint8).reshape(3000, 4001, 3)
    decoders = Decoders(IMAGE, ViewSpec(kind="flip"))
    try:
        with ThreadPoolExecutor(1) as pool:
            crashing = pool.submit(
                decoders.decode, png(Image.fromarray(large)), split="train", key="large.png"
            )
            while not crashing.done():
                for worker in workers():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGSEGV)
                wait([crashing], timeout=PAUSE_SECONDS)
            with pytest.raises(ImageDecodeError, match=r"decoder crashed on it \(SIGSEGV\)"):
                crashing.result()
        viewed = decoders.decode(png(picture(1)), split="train", key="small.png")
        assert (viewed.width, viewed.height) == (90, 70)
        assert viewed.views.shape == (2, 3, 64, 64)
    finally:
        decoders.close()
