# SPDX-License-Identifier: Apache-2.0
"""What public leaderboards ask of a network, from the records of a finished run.

RobustBench (Croce et al., NeurIPS 2021 datasets and benchmarks) takes a JSON record, the
Adversarial Pruning Benchmark (Piras et al., Pattern Recognition 2025) a state dict of its own base
networks and a form. Both have rules, and what breaks one is not written. Nothing is sent anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from harprune.files import to_json, write
from harprune.outcomes import Evaluation, Measure
from harprune.reporting.records import RunRecord, read_run
from harprune.robustness.threat import L2, Linf
from harprune.sparsity.audit import budget_of
from harprune.training import checkpoint

IMAGES = 10_000
"""Test images that both boards count on."""
THREATS = {str(Linf(8 / 255)): ("Linf", "8/255"), str(L2(0.5)): ("L2", "0.5")}
"""What RobustBench ranks on small images: the board, and its radius as it writes it."""
BENCHMARK_THREATS = (str(Linf(8 / 255)), str(Linf(0.031)))
"""What the pruning benchmark ranks."""
DATASETS = ("cifar10", "cifar100")
NETWORKS = {"resnet18": "R18", "vgg16_bn": "V16"}
"""The pruning benchmark's base networks, as they are called here."""
SPARSITIES = {"weight": ("90", "95", "99"), "filter": ("50", "75", "90")}
SPARSITIES["channel"] = SPARSITIES["filter"]


@dataclass(frozen=True)
class Paper:
    """What a board says of a method.

    Attributes:
        method: its short name, as HARP.
        key: first author, year and first word of the title, as Zhao2023Holistic.
        additional_data: it learned from more than the data set's own training images.
    """

    method: str
    key: str
    title: str
    authors: str
    link: str
    venue: str
    additional_data: bool = False


def write_entries(folder: str | Path, out: str | Path, paper: Paper) -> dict[str, str]:
    """What each board takes of a run, as files in `out`.

    Returns:
        For each board the file that was written, or why there is none.

    Raises:
        ValueError: no finished and attacked run, or one that neither board takes.
    """
    run = read_run(folder)
    if run.missing:
        raise ValueError(
            f"{folder} is not finished ({', '.join(run.missing)} missing); give the command of "
            "its run again"
        )
    made, refused = {}, {}
    for board, entries in (("RobustBench", _record), ("pruning benchmark", _submission)):
        try:
            files = entries(run, paper)
        except ValueError as error:
            refused[board] = str(error)
            continue
        for name, content in files.items():
            write(Path(out) / name, content)
        made[board] = str(Path(out) / next(iter(files)))
    if not made:
        reasons = "; ".join(f"{board}: {why}" for board, why in refused.items())
        raise ValueError(f"{folder} is for neither board: {reasons}")
    return made | refused


def _record(run: RunRecord, paper: Paper) -> Mapping[str, str]:
    """model_info/DATASET/THREAT/KEY.json of RobustBench."""
    evaluation, robust = _attacked(run)
    dataset = run.section("data").get("name", "digits")
    if dataset not in DATASETS:
        raise ValueError(f"the data set is {dataset}; it ranks {' and '.join(DATASETS)}")
    if str(evaluation.threat) not in THREATS:
        raise ValueError(
            f"the threat is {evaluation.threat}; it ranks {' and '.join(THREATS)}, so evaluate "
            "with one of them"
        )
    board, radius = THREATS[str(evaluation.threat)]
    content = {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper.venue,
        "architecture": str(run.section("model").get("name", "small_cnn")),
        "eps": radius,
        "clean_acc": _percent(evaluation.clean),
        "reported": _percent(robust),
        "footnote": f"{_kept(run)}.",
        "autoattack_acc": _percent(robust),
    }
    return {f"model_info/{dataset}/{board}/{paper.key}.json": to_json(content)}


def _submission(run: RunRecord, paper: Paper) -> Mapping[str, str | bytes]:
    """The form of the pruning benchmark, and the state dict that it is about."""
    evaluation, robust = _attacked(run)
    dataset, model = run.section("data").get("name"), run.section("model")
    if dataset != "cifar10":
        raise ValueError(f"the data set is {dataset}; of what is here it ranks cifar10")
    if model.get("name") not in NETWORKS or model.get("width"):
        other = " of another width" if model.get("width") else ""
        raise ValueError(
            f"the network is {model.get('name')}{other}; it ranks {' and '.join(NETWORKS)}"
        )
    if str(evaluation.threat) not in BENCHMARK_THREATS:
        raise ValueError(
            f"the threat is {evaluation.threat}; it ranks Linf of 8/255 or 0.031, so evaluate with "
            "one of them"
        )
    budget = run.section("budget")
    if (cost := budget.get("cost", "parameters")) != "parameters":
        raise ValueError(f"the budget counts {cost}; it ranks by the share of weights")
    structure = budget.get("granularity", "weight")
    density = float(budget.get("density", 1.0))
    sparsity = f"{100 * (1 - density):g}"
    if sparsity not in SPARSITIES[structure]:
        raise ValueError(
            f"the sparsity is {sparsity} %; of {structure}s it ranks "
            f"{', '.join(SPARSITIES[structure])}"
        )
    kind = "US" if structure == "weight" else "S"
    network = NETWORKS[model["name"]]
    key = f"{paper.method}_{paper.key}_{network}_CIFAR10_{kind}_{sparsity}"
    state, normalised = _state_dict(run)
    _require_sparse(state, structure, density)
    lines = [
        f"# {key}",
        "",
        f'_Model GDrive:_ "{key}" : ["", ".pt"]',
        f'_Distances GDrive:_ "{key}" : ["", ".pickle"]',
        "",
        f"_Clean Accuracy:_ {_percent(evaluation.clean)}",
        f"_Robust Accuracy (AA):_ {_percent(robust)}",
        "_Robust Accuracy (HO-FMN):_ ",
        "",
        f"AutoAttack standard, {evaluation.threat}, {robust.size:,} test images, by pyautoattack; "
        "the benchmark's own script attacks within 0.031, and measures the distances of HO-FMN.",
        f"{_kept(run)}; those without are zero in `{key}.pt`, which fits the base {model['name']}.",
        normalised,
        "",
    ]
    buffer = BytesIO()
    torch.save({"state_dict": state}, buffer)
    return {f"{key}.md": "\n".join(lines), f"{key}.pt": buffer.getvalue()}


def _kept(run: RunRecord) -> str:
    if run.audit is None:
        raise ValueError(f"{run.folder / 'audit.json'} is missing; restore it")
    return f"{run.audit.kept:,} of {run.audit.total:,} {run.audit.denominator} kept"


def _attacked(run: RunRecord) -> tuple[Evaluation, Measure]:
    """The pruned network's evaluation and its robust accuracy, if a board can take them."""
    evaluation = run.attacked["finetuned"]
    robust = evaluation.attacks.get("autoattack")
    if robust is None or "version='standard'" not in (robust.attack or ""):
        raise ValueError("robustness was not measured by autoattack; add it to attack.attacks")
    if robust.size < IMAGES:
        raise ValueError(
            f"{robust.size:,} test images were attacked and {IMAGES:,} are asked for; leave "
            "attack.size out"
        )
    failed = [name for name, check in evaluation.checks.items() if not check.passed]
    if evaluation.flags or failed:
        doubts = ", ".join((*evaluation.flags, *failed))
        raise ValueError(f"the evaluation is in doubt ({doubts}); see its report")
    return evaluation, robust


def _state_dict(run: RunRecord) -> tuple[dict[str, Tensor], str]:
    """The network's tensors, and a sentence on the normalisation before it."""
    tensors, _ = checkpoint.load(run.folder / "finetuned.safetensors")
    state = checkpoint.unpack("model", tensors)
    constants = [run.section("model").get(name) for name in ("mean", "std")]
    if constants[0] is None:
        return state, "Images are not normalised."
    inner = "network."
    state = {n.removeprefix(inner): t for n, t in state.items() if n.startswith(inner)}
    return state, f"Images are normalised: mean {constants[0]}, standard deviation {constants[1]}."


def _require_sparse(state: Mapping[str, Tensor], structure: str, density: float) -> None:
    """Refuse tensors that keep more than `density`: a budget may leave out layers, a board not.

    Of filters and channels those count as pruned that are zero as a whole. The filters of a linear
    layer are classes, which nothing prunes.
    """
    kept, total = 0, 0
    for weight in (t for t in state.values() if t.dim() > (2 if structure == "filter" else 1)):
        own = weight != 0
        if structure != "weight":
            axis = 0 if structure == "filter" else 1
            others = [a for a in range(weight.dim()) if a != axis]
            own = (own.sum(dim=others, keepdim=True) > 0).expand_as(own)
        kept, total = kept + int(own.sum()), total + own.numel()
    if kept > budget_of(density, total):
        whole = "" if structure == "weight" else f" in {structure}s that are not zero"
        raise ValueError(
            f"{kept:,} of all {total:,} weights are kept{whole}, more than {100 * density:g} %; "
            "prune every layer (budget.include, budget.exclude)"
        )


def _percent(measure: Measure) -> str:
    return f"{100 * measure.accuracy:.2f}"
