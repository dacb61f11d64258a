"""The files of a run folder: record, reader and writer of each, once, and without torch."""
