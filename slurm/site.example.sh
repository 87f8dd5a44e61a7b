# What differs between clusters. Copy to site.sh (which git ignores) and change; or set the same in the environment.
# `body.sh` lists every variable with its default.

# RA3_VENV=/shared/envs/ra3
# RA3_MODULES="cuda/13.0 nccl"
# RA3_CONTAINER=/shared/images/ra3.sqsh
# RA3_MOUNTS=/shared,/home
# RA3_SRUN="--mpi=none"
# RA3_RUNS=/shared/runs
# RA3_MODELS=/shared/models        # holds Llama-3.1-8B and its like
# RA3_DATA='/shared/python/*.parquet'

# The interface between nodes, where the first one is not it.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# sbatch reads these from the environment, before the job starts: put them into your shell's profile.
# export SBATCH_PARTITION=batch SBATCH_ACCOUNT=me
