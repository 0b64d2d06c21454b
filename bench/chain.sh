#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Wall time of a whole chain, stage by stage, in torch alone and on the sparse kernels.
#
#   bench/chain.sh recipes/digits.toml
#   bench/chain.sh recipes/cifar10-small-harp-99.toml --set attack.size=100 --set attack.dense=false
#
# Every run is a new one: what is in RUNS (runs/chain when unset) under its name is an error.
set -eu
recipe="$1"
shift
harprune="${HARPRUNE:-harprune}" runs="${RUNS:-runs/chain}" name="$(basename "$recipe" .toml)"

for execution in dense auto; do
    folder="$runs/$name-$execution"
    if [ -e "$folder" ]; then
        echo "$folder: exists; remove it or set RUNS" >&2
        exit 2
    fi
    for stage in pretrain prune finetune attack; do
        started=$SECONDS
        "$harprune" run "$recipe" --out "$folder" --until "$stage" --execution "$execution" "$@"
        echo "$name $execution: $stage took $((SECONDS - started)) s"
    done
done
