#!/bin/bash
# Stage one over the nodes of a Ray cluster: one actor per GPU, or per CPU core where there is none.
#
#   RAY_ADDRESS=head:6379 pipelines/cluster/ray_encode.sh imagenet/ shards/ [options of encode]
#
# Folder and images must have the same path on every node, and every node needs this package
# (pip install 'ci2p-cache[ray]'). Without RAY_ADDRESS Ray starts on this machine alone.
# Tried: a local cluster of three nodes on two CPU cores, one node killed in mid-run; the result has
# the bytes of one process (tests/encoding/test_executors.py). Not tried: several machines, GPUs.
set -euo pipefail
source_images=$1 out=$2
shift 2
exec ci2p-cache encode "$source_images" --out "$out" --executor ray "$@"
