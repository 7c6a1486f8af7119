# shellcheck shell=bash
# Sourced by what starts runs on GPUs: how JAX and XLA use them. What is set already stays.
#
# JAX takes 75 % of a GPU's memory unless it is told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
flags="--xla_gpu_triton_gemm_any=true"
# Between nodes, gradients are summed while the backward pass goes on.
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
  flags="$flags --xla_gpu_enable_latency_hiding_scheduler=true"
fi
export XLA_FLAGS="$flags ${XLA_FLAGS:-}"
