#!/usr/bin/env bash
# Starts opt_jax on every host of a Cloud TPU slice; JAX finds the hosts by itself.
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/pretrain.py:base --config.precision=bfloat16 --workdir=/shared/base
#
# Before: the repository at ~/opt_jax on every host, with `pip install -e '.[demo,tpu]'`, and one file system (such as
# Filestore) mounted at the same place on all hosts for the workdir. The same command goes on after a preemption.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE --config=configs/pretrain.py:base --workdir=DIRECTORY [options]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# Quoted once more, because the shell of each host reads it again.
options=$(printf ' %q' "$@" --config.distributed.coordinator=auto)
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/opt_jax && python3 -m opt_jax.main$options"
