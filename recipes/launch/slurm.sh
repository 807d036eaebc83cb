#!/bin/bash
# Start a fine-tune from a checkpoint on the nodes of a Slurm job, without NeMo-Run.
#
#   sbatch --account=LAB --partition=GPU --nodes=2 recipes/launch/slurm.sh \
#       recipe=llama/causal_lm model.initial_ckpt_path=/data/ckpt output_dir=/data/start \
#       placement=cuda_bf16 placement.strategy=fsdp2
#
# What sbatch is given before the script's name counts more than the lines below: --gpus-per-node=4 on
# nodes of four, --mem=0 for all memory of a node where the cluster would give less. Checkpoint and
# output_dir lie where every node sees them. BIOINIT_ENV names a virtual environment to activate,
# PROCESSES how many processes a node runs: one for each GPU that Slurm gave it, if not set.

#SBATCH --job-name=bioinit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=01:00:00

set -euo pipefail

if [ -n "${BIOINIT_ENV:-}" ]; then
    source "$BIOINIT_ENV/bin/activate"
fi

processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
# Jobs that share a node need ports of their own.
port=$((20000 + SLURM_JOB_ID % 20000))

# One torchrun for each node; if one ends badly, Slurm ends the others.
exec srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$processes" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:$port" \
    -m bioinit init "$@"
