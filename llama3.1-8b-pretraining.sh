#!/usr/bin/env bash
#
# Classic multi-node pretraining on the same training config, for comparison: one
# torchrun job over all nodes, which a lost node ends as a whole.
#
#   sbatch -N 2 llama3.1-8b-pretraining.sh
#
# Submit from the repository's root. Flags of sbatch win over the lines below.
#
#   variable            default                        meaning
#   TFT_CONFIG          configs/llama3.1-8b.toml       torchtitan config file
#   TFT_RANKS_PER_NODE  GPUs of the node               ranks on each node
#   TFT_DEVICE          cuda                           cuda or cpu
#   TFT_EXTRA_ARGS                                     extra torchtitan flags
#   TFT_INTERFACE                                      network interface of NCCL and gloo
#   TFT_ENV             .env                           virtual environment
#   (all of them: README.md)
#
#SBATCH --job-name=classic
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=outputs/torchft/.slurm/classic-%j.out
#SBATCH --error=outputs/torchft/.slurm/classic-%j.err

set -euo pipefail

: "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the repository}"
cd "$SLURM_SUBMIT_DIR"
[ -f slurm/common.sh ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the root of the repository: submit from there" >&2
    exit 2
}
# shellcheck source=slurm/common.sh
source slurm/common.sh

tft_keep_logs "${TFT_OUTPUTS:-outputs}/classic/$SLURM_JOB_ID" "classic-$SLURM_JOB_ID"
tft_activate
# One launcher a node; a node's failure ends the whole job (there is no surviving it).
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m launcher.task classic
