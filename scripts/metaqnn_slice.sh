#!/usr/bin/env bash
# The studies of docs/metaqnn.md at their full schedules, one slice of at most MINUTES (8) of the first unfinished
# one; call it until it says that all are done.  OUT (metaqnn_full) holds what resumes.  Has not been run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-metaqnn_full}
mkdir -p "$out"
studies=("mnist3 q-learning" "mnist3 ppo" "cifar5 q-learning" "cifar5 ppo" "cifar5 q-learning --penalty" "cifar10 ppo")
for study in "${studies[@]}"; do
  read -r data strategy penalty <<<"$study "
  folder=$out/$data-$strategy$penalty
  [ -e "$folder/metaqnn.json" ] && continue
  exec "${PYTHON:-python}" -m rlnas_fast.cli experiment metaqnn --data "$data" --strategy "$strategy" ${penalty:+$penalty} \
    --schedule full --device "${DEVICE:-cuda:0}" --workers "${WORKERS:-6}" --batch-size "${WORKERS:-6}" \
    ${TASK:+--task "$TASK"} --cache "$out/measurements.sqlite" --max-minutes "${MINUTES:-8}" --out "$folder"
done
echo "all studies are done: $out/*/metaqnn.json"
