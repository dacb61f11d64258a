"""The demo: generated pictures through both stages, to see that this machine does it all."""

from ci2p_cache.demo.records import DemoEvent, DemoOptions, DemoResult, DemoStep
from ci2p_cache.demo.run import run_demo

__all__ = ["DemoEvent", "DemoOptions", "DemoResult", "DemoStep", "run_demo"]
