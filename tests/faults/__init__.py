"""Real faults for real processes: a preloaded shim, and a warm parent that forks a child each."""
