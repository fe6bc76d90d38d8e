#!/bin/bash
# Train on two machines of 8 GPUs each, from the project's folder: sbatch examples/slurm.sh
#
# Tried with stand-ins for Slurm only, not on a cluster. Adapt the numbers, and add your cluster's account and partition.
#SBATCH --job-name=nanogpt-fp8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=04:00:00
# SIGTERM two minutes before the job is pre-empted or its time ends: training saves a checkpoint and stops with status 0.
#SBATCH --signal=TERM@120
set -e
# srun of Slurm 22.05 to 23.02 does not look at --cpus-per-task above
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# If the folder is shared by the machines: make the environment and download the data once, on one machine.
srun --nodes=1 --ntasks=1 bash run.sh setup

# One task per machine; run.sh starts one process per GPU. Submitted again, the job continues from its newest checkpoint.
srun bash run.sh --run_name=two-nodes --resume=auto
