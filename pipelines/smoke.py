"""Smoke: the whole path on pictures that are drawn here, to see that a machine does it all.

Paper:    none.
Command:  ci2p-cache run pipelines/smoke.py:smoke
Hours:    about 15 seconds on two cores. Disk: 250 MB, most of it checkpoints.
Hardware: one CPU core.
Expect:   that it ends. The accuracy (about 70 % where guessing gives 20 %, of 19 pictures) says
          nothing: five epochs of 64 px, generated patterns.
"""

from __future__ import annotations

import ci2p_cache as cc


def smoke() -> cc.Experiment:
    """100 drawn pictures of five classes through encode, train, evaluate and report."""
    return cc.Experiment(
        name="smoke",
        claim="the whole path works on this machine; the accuracy says nothing",
        generate=20,
        encode=cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.2),
        train=cc.TrainSpec(model="vitds_tiny", epochs=5, batch_size=16),
    )
