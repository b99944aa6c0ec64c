#!/usr/bin/env bash
# Starts opt_jax on a SLURM cluster, one process for each GPU, which JAX finds through SLURM's variables.
#
#   sbatch launch/slurm.sh --config=configs/pretrain.py:base --workdir=/shared/runs/base
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=...
#
# Submit it from the repository, with the environment activated (pip install -e '.[demo,cuda12]'). The workdir must
# lie on a file system that all nodes share. Two minutes before the time is up the run saves and the job is queued
# again; a node that is lost costs what was done since the last checkpoint.
#SBATCH --job-name=opt_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=opt_jax-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh --config=configs/pretrain.py:base --workdir=DIRECTORY [options]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

code=0
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m opt_jax.main "$@" || code=$?
# 143: stopped by SIGTERM after saving. The same job goes on where it was.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
