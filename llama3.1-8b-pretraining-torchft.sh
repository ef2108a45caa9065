#!/usr/bin/env bash
#
# Fault-tolerant pretraining: every array task is one replica group, on one node or several.
#
#   python -m launcher lighthouse up --detach      # once, on the login node
#   sbatch --array=0-3 llama3.1-8b-pretraining-torchft.sh
#   python -m launcher monitor
#
# Groups of two nodes each: sbatch --nodes=2 --array=0-3 …
#
# Submit from the repository's root. Flags of sbatch win over the lines below. A task
# that loses its node is requeued by Slurm, rejoins the quorum and heals from a peer.
#
#   variable            default                        meaning
#   TFT_CONFIG          configs/llama3.1-8b.toml       torchtitan config file
#   TFT_METHOD          hsdp                           hsdp, ddp, local-sgd or diloco
#   TFT_RANKS_PER_NODE  GPUs of the task               ranks on the node
#   TFT_DEVICE          cuda                           cuda or cpu
#   TFT_EXTRA_ARGS                                     extra torchtitan flags
#   TFT_INTERFACE                                      network interface of NCCL and gloo
#   TFT_ENV             .env                           virtual environment
#   TORCHFT_LIGHTHOUSE  what `lighthouse up` wrote     http://host:port
#   (all of them: README.md)
#
#SBATCH --job-name=tft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR2@600
#SBATCH --open-mode=append
#SBATCH --output=outputs/torchft/.slurm/tft-%A_%a.out
#SBATCH --error=outputs/torchft/.slurm/tft-%A_%a.err

set -euo pipefail
trap '' USR2 # of a time limit that is near: the launcher's

: "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the repository}"
cd "$SLURM_SUBMIT_DIR"
[ -f slurm/common.sh ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the root of the repository: submit from there" >&2
    exit 2
}
# shellcheck source=slurm/common.sh
source slurm/common.sh

[ -n "${SLURM_ARRAY_JOB_ID:-}" ] ||
    tft_fail "not in an array: submit with 'sbatch --array=0-3 llama3.1-8b-pretraining-torchft.sh'"
run=${TFT_RUN:-tft-$SLURM_ARRAY_JOB_ID}
tft_keep_logs "${TFT_OUTPUTS:-outputs}/torchft/$run" "${run}_$SLURM_ARRAY_TASK_ID"
tft_activate
tft_run python -m launcher.task replica
