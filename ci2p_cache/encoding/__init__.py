"""Stage one: from images to a committed cache."""
