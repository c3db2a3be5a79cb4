#!/usr/bin/env bash
# Starts n processes of one run on this machine, as many hosts would; for trying multi-host runs.
#   launch/local.sh 2 --config=configs/stage3.py:smoke --workdir=runs/two
# export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks for huge pages: on CPU a few percent of a step.
# JAX_NUM_CPU_DEVICES=k gives each process k CPU devices (gloo joins them).
set -euo pipefail
n=${1:?usage: launch/local.sh PROCESSES ARGUMENTS...}
shift
port=${MMJAX_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < n; i++)); do
  "${PYTHON:-python}" -m mmjax.main "$@" --coordinator="localhost:$port" --processes="$n" --process="$i" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  # `wait` returns early when a signal comes; ask again until the process is really gone.
  while true; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$status" -eq 0 ] || code=$status
done
exit "$code"
