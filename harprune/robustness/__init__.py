# SPDX-License-Identifier: Apache-2.0
"""How a network is attacked and hardened: threats, attacks, training losses, evaluation."""

from harprune.robustness.attacks import (
    APGD,
    FGSM,
    PGD,
    Attack,
    Margin,
    clean_logits,
    cross_entropy,
    dlr,
    eval_mode,
    kl_divergence,
    labels,
    no_start,
    normal_start,
    uniform_start,
)
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.evaluation import (
    Evaluation,
    Measure,
    evaluate,
    load_evaluation,
    paired,
    subset,
)
from harprune.robustness.objectives import (
    MART,
    MART_ATTACK,
    PGDAT,
    TRADES,
    TRADES_ATTACK,
    Free,
    Natural,
    Objective,
)
from harprune.robustness.sanity import Check
from harprune.robustness.threat import L2, Linf, Threat, make_threat, parse_epsilon

__all__ = [
    "APGD",
    "FGSM",
    "L2",
    "MART",
    "MART_ATTACK",
    "PGD",
    "PGDAT",
    "TRADES",
    "TRADES_ATTACK",
    "Attack",
    "AutoAttack",
    "Check",
    "Evaluation",
    "Free",
    "Linf",
    "Margin",
    "Measure",
    "Natural",
    "Objective",
    "Threat",
    "clean_logits",
    "cross_entropy",
    "dlr",
    "eval_mode",
    "evaluate",
    "kl_divergence",
    "labels",
    "load_evaluation",
    "make_threat",
    "no_start",
    "normal_start",
    "paired",
    "parse_epsilon",
    "subset",
    "uniform_start",
]
