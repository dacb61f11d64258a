"""A trained run at work: evaluated, shown new pictures, exported. A run folder is all it needs."""
