#!/usr/bin/env bash
# One node's part of a training on several nodes. Run it on every node, with the same arguments, from
# the checkout; slurm.sbatch does so by itself. On the node of NODE_RANK 0, here called node-a:
#
#   NUM_NODES=2 NODE_RANK=0 MASTER=node-a examples/multinode/torchrun.sh \
#       --config examples/multinode/nodes2.yaml --data-path DATA --tokenizer-model TOKENIZER \
#       --save RUN --load RUN
#
# and on the other with NODE_RANK=1. The order does not matter: the first waits for the last.
#
#   NUM_NODES       nodes of the run (1)
#   NODE_RANK       number of this node, from 0 (Slurm's)
#   MASTER          name or address of node 0, which the others can reach
#   MASTER_PORT     a free port there (29400)
#   PROCESSES       processes on this node (its GPUs)
#   MAX_RESTARTS    how often to start again from the newest checkpoint after a failure (3)
#   LOCAL_ADDRESS   address of this node, where its name does not lead the others to it
#   NETWORK_DEVICE  network device between the nodes (the libraries choose)
#
# SIGUSR1 to this script on any node saves a checkpoint and ends the run, with exit code 0.
set -euo pipefail

num_nodes=${NUM_NODES:-1}
node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
if [[ $num_nodes == 1 ]]; then
    node_rank=0
    MASTER=${MASTER:-localhost}
fi
: "${node_rank:?NODE_RANK is not set: give each node its number, 0 on the node called MASTER}"
: "${MASTER:?MASTER is not set: give the name or address of the node with NODE_RANK 0}"

if [[ ! $num_nodes =~ ^[0-9]+$ || ! $node_rank =~ ^[0-9]+$ ]] || ((node_rank >= num_nodes)); then
    echo "NODE_RANK $node_rank of NUM_NODES $num_nodes: give numbers, the first below the second" >&2
    exit 2
fi

# --- Processes -----------------------------------------------------------------------------------
# torchrun would set 1 as well where it starts several processes, and say so in a warning. Raise it
# for training on CPUs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One queue between host and GPU keeps kernels in launch order, which Megatron's overlap of
# tensor-parallel communication with computation relies on. The program sets it too, if it is unset.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Lines of the log appear when they are written.
export PYTHONUNBUFFERED=1

# --- Restarts ------------------------------------------------------------------------------------
# torchrun shares its store with the processes it starts, and keeps it when it restarts them: they
# would find the addresses of the processes before them. The program refuses restarts without this.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds between the SIGTERM that torchrun passes on and its SIGKILL (30 without this; torch 2.13
# reads it): enough for the step at hand and a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# A failed or stuck NCCL operation ends its process after --distributed-timeout-minutes, so that
# torchrun can restart. The default, and torchrun's; 0 would let it hang.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# --- Network -------------------------------------------------------------------------------------
# Nodes often have several networks, and a library's own choice may be one without a way to the other
# nodes. NCCL_SOCKET_IFNAME: where NCCL's processes find each other (and send, without InfiniBand);
# GLOO_SOCKET_IFNAME: the same for gloo, which carries what is on the CPU.
if [[ -n ${NETWORK_DEVICE:-} ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_DEVICE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_DEVICE}
fi
# WARN: NCCL explains its errors, and says nothing else. INFO also tells which devices and protocols
# it chose: look there for "NET/IB" or "NET/Socket" if the network is slow.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Left to NCCL, to be set in the environment where its choice is wrong:
#   NCCL_IB_HCA       InfiniBand or RoCE adapters to use, by the beginning of their names: mlx5; with
#                     a leading =, by their whole names and ports: =mlx5_0:1; with ^, all but these
#   NCCL_NVLS_ENABLE  0 turns NVLink SHARP off, for the GPU memory that its buffers take

# --- Start ---------------------------------------------------------------------------------------
options=(
    --nnodes "$num_nodes"
    --nproc-per-node "${PROCESSES:-gpu}"
    --max-restarts "${MAX_RESTARTS:-3}"
    --rdzv-backend c10d
    --rdzv-endpoint "$MASTER:${MASTER_PORT:-29400}"
    --rdzv-id "${RUN_ID:-${SLURM_JOB_ID:-megatron-memory}}"
    # torchrun otherwise guesses by names and addresses whether this is node 0, which fails where a
    # node has several.
    --rdzv-conf "is_host=$((node_rank == 0))"
)
if [[ -n ${LOCAL_ADDRESS:-} ]]; then options+=(--local-addr "$LOCAL_ADDRESS"); fi

# torchrun itself ignores SIGUSR1, which a scheduler may send to every process: it must live until
# its processes have saved. They catch it.
(
    trap '' USR1
    exec torchrun "${options[@]}" -m megatron_memory.train "$@"
) &
torchrun=$!

stop_and_save() {
    local processes
    processes=$(cat /proc/"$torchrun"/task/*/children 2>/dev/null) || true
    # shellcheck disable=SC2086 # one word a process
    if [[ -n $processes ]]; then kill -USR1 $processes 2>/dev/null || true; fi
}
trap stop_and_save USR1
trap 'kill -TERM "$torchrun" 2>/dev/null || true' INT TERM

# A trapped signal ends `wait` early, with a code above 128.
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" || true; done
wait "$torchrun"
