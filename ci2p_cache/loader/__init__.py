"""Stage two's door: from a cache to batches on the device."""
