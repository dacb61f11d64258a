"""Measurements against named alternatives, each from one command; see README.md."""
