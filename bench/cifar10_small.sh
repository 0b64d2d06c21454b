#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The table of results/cifar10-small.md: one dense network, then HARP, HYDRA and one-shot ERK/LAMP at
# 1 % of its weights, each attacked on 1,000 test images. After the dense network each chain takes some ten
# minutes of one thread (docs/log.md), two of them at a time; interrupted, the same command goes on.
set -eu
cd "$(dirname "$0")/.."
harprune="${HARPRUNE:-harprune}"

"$harprune" run recipes/cifar10-small-dense.toml --until pretrain --out runs/cifar10-small-dense
printf '%s\n' harp hydra erk lamp | xargs -P "${JOBS:-2}" -I NAME \
    "$harprune" run recipes/cifar10-small-NAME-99.toml --out runs/cifar10-small-NAME-99
"$harprune" report runs/cifar10-small-{harp,hydra,erk,lamp}-99 --out results/cifar10-small.md \
    --baseline harp --title "CIFAR-10, a ResNet-18 of 16 channels, 1 % of the weights" \
    --note "Made by bench/cifar10_small.sh: fast adversarial training at epsilon 8/255, 16 epochs for \
the dense network and 12 more for each pruned one, epochs selected on 2,500 held-out training images, \
1,000 test images attacked."
