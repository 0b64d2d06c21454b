#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The ResNet-18 that HARP pruned to 1 %, as it lies in results/headline, evaluated again on real
# CIFAR-10: clean accuracy on all 10,000 test images, AutoAttack on 200 of them. Says on how many
# images the outcome is another than in the table; fails where more than one in a hundred is.
#
#   bench/headline_check.sh          # against what is kept beside the network
#   bench/headline_check.sh --out    # keep it; bench/headline.sh does this once
set -eu
cd "$(dirname "$0")/.."
harprune="${HARPRUNE:-harprune}" what="${1:---against}" name=resnet18-harp-0.01

evaluated() { # kept [options...]
    "$harprune" evaluate --model "results/headline/$name.hpn" --data cifar10 --set "name=$name" \
        "${@:2}" "$what" "results/headline/$1"
}
evaluated "$name-clean" --attack none # as bench/headline_clean.py keeps it
evaluated "$name-check" --size 200
