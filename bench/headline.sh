#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tables of results/headline-ARCH.md: a dense ResNet-18 and a dense VGG-16-BN, and from each HARP, HYDRA
# with uniform densities, one-shot ERK and one-shot LAMP at 1 % and 0.1 % of the weights, each attacked
# on 1,000 test images of CIFAR-10. Interrupted, the same command goes on. The dense networks, rounded to
# float16, the pruned ones and the records of their runs are left in results/headline; a dense network
# that lies there is not trained again, and records that lie there stand in the tables.
#
#   bench/headline.sh                              # all of it
#   ARCHS=resnet18 DENSITIES=0.01 bench/headline.sh    # the part worth a night
#   CONFIGURATIONS=harp THREADS=2 JOBS=1 bench/headline.sh    # one run at a time, on two threads
#
# Every pruned network costs ten epochs: HARP seven of pruning and three of finetuning, HYDRA three and
# seven, one-shot pruning ten of finetuning.
#
# Estimated from times of single steps on two cores of an AMD EPYC with AVX512-BF16, ResNet-18, in hours:
#   dense       8 epochs of 15 minutes                                       2.0
#   at 1 %      a step of pruning takes 2.6 CPU seconds (HARP), of finetuning 0.9 (ERK) to 1.6 (LAMP),
#               an epoch has 371: HARP 1.2, LAMP 0.9, ERK 0.5, HYDRA 0.5     3.1
#               AutoAttack, 6 s (ERK) to 12 s (LAMP) for each of about 400 images that resist   2.0
#   dense       AutoAttack on 250 images, 100 s for each of some 110 that resist   1.5
#               so far 8.6
#   at 0.1 %    all four, AutoAttack included                                1.5
# VGG-16-BN takes about 0.6 of that.
set -eu
cd "$(dirname "$0")/.."
export harprune="${HARPRUNE:-harprune}" runs="${RUNS:-runs/headline}" networks=results/headline threads="${THREADS:-1}"

stages() { # folder stages... -- arguments of run: each stage timed; fails where one is refused
    local folder="$1" started
    shift
    local stages=()
    while [ "$1" != -- ]; do stages+=("$1") && shift; done
    shift
    for stage in "${stages[@]}"; do
        started=$SECONDS
        if ! "$harprune" run "$@" --until "$stage" --out "$folder"; then
            echo "$folder: stopped in $stage after $((SECONDS - started)) s"
            return 1
        fi
        echo "$folder: $stage took $((SECONDS - started)) s"
    done
}
pruned() { # arch density configuration [settings...] -- the run of a pruned network, to its end
    local name="$1-$3-$2" recipe="$3" allocation="$3" settings
    case "$3" in
        harp) allocation=lamp ;;
        hydra) allocation=uniform ;;
        *) recipe=oneshot ;;
    esac
    settings=("recipes/headline/$recipe.toml" --set "name=$name" --set "model.name=${1//-/_}"
        --set "model.weights=$networks/$1-dense.safetensors" --set "budget.density=$2"
        --set "budget.allocation=$allocation" --set "execution.threads=$threads" "${@:4}")
    stages "$runs/$name" prune finetune -- "${settings[@]}" &&
        "$harprune" export "$runs/$name" --out "$networks/$name.hpn" &&
        stages "$runs/$name" attack report -- "${settings[@]}" &&
        record "$runs/$name" "$networks/$name"
}
record() { # run copy -- what tables are made of, and the log: all but networks and report
    rm -rf "$2" && mkdir "$2"
    (cd "$1" && tar -c --exclude='*.safetensors' --exclude=report -- *) | tar -C "$2" -x
}
export -f stages pruned record

for arch in ${ARCHS:-resnet18 vgg16-bn}; do
    if [ ! -e "$networks/$arch-dense.safetensors" ]; then
        stages "$runs/$arch-dense" pretrain -- "recipes/headline/$arch-dense.toml"
        "${PYTHON:-python}" bench/halved.py "$runs/$arch-dense/dense.safetensors" "$networks/$arch-dense.safetensors"
    fi
    for density in ${DENSITIES:-0.01 0.001}; do
        printf '%s\n' ${CONFIGURATIONS:-harp lamp erk hydra} |
            xargs -P "${JOBS:-2}" -I CONFIGURATION bash -uc "pruned $arch $density CONFIGURATION || true"
    done
    # The dense network costs most, and all began with it: it is attacked once, and last.
    pruned "$arch" 0.01 harp --set attack.dense=true --set attack.dense_size=250 || true
    finished=()
    for outcome in "$networks/$arch"-*/attack/finetuned/evaluation.json; do finished+=("${outcome%/attack/*}"); done
    "$harprune" report "${finished[@]}" --out "results/headline-$arch.md" --baseline harp \
        --title "CIFAR-10, $arch, 1 % and 0.1 % of the weights" \
        --note "Made by bench/headline.sh. The dense network: fast adversarial training at epsilon 8/255, 8 epochs. \
Every pruned one: PGD-3 adversarial training for ten epochs more. HARP spends seven on pruning and, beyond its paper, \
trains the network meanwhile (train_weights); HYDRA prunes in three; one-shot pruning finetunes in all ten. Epochs \
selected by PGD on held-out training images, 500 for the dense network and 1,000 for the pruned ones; test images \
attacked: 1,000, of the dense network 250. A configuration that is missing was refused, because its mask cuts \
the logits off from the image."
done
if [ -e "$networks/resnet18-harp-0.01.hpn" ] && [ ! -e "$networks/resnet18-harp-0.01-check" ]; then
    bench/headline_check.sh --out
fi
