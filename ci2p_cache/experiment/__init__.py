"""Whole experiments: one record for both stages, where it is loaded from, and how it is run."""
