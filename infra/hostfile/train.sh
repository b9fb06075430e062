#!/bin/bash
# Train on the machines of a hostfile, by DeepSpeed's launcher (ssh without a password from here to each of them):
#   VC2_STORE=s3://bucket/vc2 infra/hostfile/train.sh infra/hostfile/hostfile full --recipe paper
# vc2 is installed at the same place on all machines. What they need from the environment stands in ~/.deepspeed_env,
# a line each: VC2_STORE=..., VC2_WORK=..., AWS_...; DEEPSPEED_OPTIONS are more options of the launcher.
set -euo pipefail
hostfile=$1
shift
first=$(grep -v '^#' "$hostfile" | head -n 1 | cut -d' ' -f1)
# shellcheck disable=SC2086 # several words
exec deepspeed --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" \
    ${DEEPSPEED_OPTIONS:-} --no_local_rank --module vc2.cli train "$@" --set launcher=env
