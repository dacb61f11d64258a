"""Who encodes the missing shards of a run: this process, several, or the nodes of a cluster."""
