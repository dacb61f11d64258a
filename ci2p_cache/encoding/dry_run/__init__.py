"""What encoding a source would take, found by encoding a sample of it."""
