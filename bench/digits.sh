#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The table of results/digits.md: for three seeds, HARP, HYDRA and one-shot LAMP at 5 % and 1 % beside
# the dense network. Interrupted, the same command goes on.
set -eu
cd "$(dirname "$0")/.."
harprune="${HARPRUNE:-harprune}"

prune() { # seed method allocation density: one pruned network, from the dense one of its seed
    "$harprune" run recipes/digits.toml --out "runs/digits/$2-$4-seed$1" \
        --set "name=digits-$2-$4-seed$1" --set "seed=$1" --set execution.threads=1 \
        --set "model.weights=runs/digits/dense-seed$1/dense.safetensors" --set attack.size=360 --set attack.batch_size=360 \
        --set "attack.dense=$5" --set "budget.density=$4" --set "budget.allocation=$3" \
        --set "method={name = \"$2\"$6}"
}
chain() { # seed: the dense network, then everything pruned from it
    "$harprune" run recipes/digits.toml --until pretrain --out "runs/digits/dense-seed$1" \
        --set "name=digits-dense-seed$1" --set "seed=$1" --set execution.threads=1
    for density in 0.05 0.01; do
        prune "$1" harp erk "$density" "$([ "$density" = 0.05 ] && echo true || echo false)" ", gamma = 0.05"
        prune "$1" hydra uniform "$density" false ""
        prune "$1" magnitude lamp "$density" false ""
    done
}
export -f chain prune
export harprune
printf '%s\n' 0 1 2 | xargs -P "${JOBS:-2}" -I SEED bash -euc 'chain SEED'
"$harprune" report runs/digits/{harp,hydra,magnitude}-0.0{5,1}-seed{0,1,2} --out results/digits.md \
    --baseline harp --title "Digits, 5 % and 1 % of the weights" \
    --note "Made by bench/digits.sh: PGD adversarial training on scikit-learn's 8 x 8 digits, \
epsilon 0.1, AutoAttack on all 360 test images, three seeds."
