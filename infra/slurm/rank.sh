#!/bin/bash
# What Slurm calls a task is a rank: its variables under the names that ranks read, then the command itself.
#   srun infra/slurm/rank.sh vc2 train full --set launcher=env ...
# MASTER_ADDR and MASTER_PORT are set by train.sbatch.
set -euo pipefail
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
exec "$@"
