"""What `verify` finds damaged, put back to the same bytes."""
