# SPDX-License-Identifier: Apache-2.0
"""A recipe's names turned into objects."""

import atexit
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from harprune.deploy import artifact
from harprune.deploy.module import Module
from harprune.deploy.network import Network
from harprune.methods.admm import ADMM
from harprune.methods.base import Budget, Limit, Method
from harprune.methods.bcs import BCS
from harprune.methods.flying_bird import FlyingBird
from harprune.methods.grasp import GraSP
from harprune.methods.harp import HARP
from harprune.methods.hydra import HYDRA
from harprune.methods.li20 import Li20
from harprune.methods.mad import MAD
from harprune.methods.oneshot import Magnitude, Random
from harprune.methods.robust_bird import RobustBird
from harprune.methods.rst import RST
from harprune.methods.s2ap import S2AP
from harprune.methods.snip import SNIP
from harprune.methods.synflow import SynFlow
from harprune.methods.twinrep import TwinRep
from harprune.models.registry import create_model
from harprune.models.weights import load_weights
from harprune.pipeline import recipe as recipes
from harprune.pipeline.recipe import Recipe
from harprune.robustness import attacks, objectives
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.awp import AWP
from harprune.robustness.pwoa import PwoA
from harprune.robustness.threat import Linf, Threat, make_threat, parse_epsilon
from harprune.sparsity import allocation, costs, execution
from harprune.sparsity.execution import Execution, Twin
from harprune.sparsity.granularity import Granularity
from harprune.training import checkpoint
from harprune.training.augmentation import default_augmentation
from harprune.training.batches import Batches
from harprune.training.data import load_dataset
from harprune.training.splits import Dataset, Split, split_validation, to_float
from harprune.user_code import current_directory_importable, user_function

METHODS: dict[str, type[Method]] = {
    "harp": HARP,
    "hydra": HYDRA,
    "magnitude": Magnitude,
    "random": Random,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "li20": Li20,
    "rst": RST,
    "twinrep": TwinRep,
    "flying-bird": FlyingBird,
    "robust-bird": RobustBird,
    "admm": ADMM,
    "mad": MAD,
    "bcs": BCS,
}

PLUG_INS = {"s2ap": S2AP}
"""What a method's name may be followed by, as in `harp+s2ap`."""

_WITHOUT_SCORES = {kind for kind in METHODS.values() if kind not in (HARP, HYDRA, RST)}

ALLOCATIONS: dict[str, allocation.Allocation] = {
    "uniform": allocation.uniform,
    "erk": allocation.erk,
    "lamp": allocation.lamp,
    "igq": allocation.igq,
    "global": allocation.global_magnitude,
}

_PARITY_EPSILON, _PARITY_STEP = 0.031, 0.0078


@dataclass(frozen=True)
class Materials:
    """The images and the network of a run.

    `network()` gives a fresh plain network: randomly initialised from the run's seed, or with
    the weights the recipe names (`given`).
    """

    train: Split
    validation: Split
    test: Split | None
    num_classes: int | None
    network: Callable[[], nn.Module]
    given: bool

    @cached_property
    def example(self) -> Tensor:
        """One training image as a batch, float in [0, 1]."""
        return to_float(self.train.images[torch.tensor([0])])


def materials(recipe: Recipe) -> Materials:
    """Load the data of `recipe` and prepare its network."""
    dataset = load_data(recipe.data)
    train, validation = split_validation(dataset.train, recipe.data.validation, recipe.seed)
    return Materials(
        train=train,
        validation=validation,
        test=dataset.test,
        num_classes=dataset.num_classes,
        network=lambda: network(recipe.model, dataset, recipe.seed),
        given=recipe.model.weights is not None,
    )


def load_data(section: recipes.Data) -> Dataset:
    """The data set of a recipe."""
    return load_dataset(section.name, section.folder, image_size=section.image_size)


def network(section: recipes.Model, dataset: Dataset, seed: int) -> nn.Module:
    """The plain network of a recipe, its initial weights a function of the seed."""
    if is_exported(section.name):
        raise ValueError(
            f"model.name = {section.name!r} is an exported network, pruned for good; "
            "`harprune evaluate` takes it, everything else its run"
        )
    channels = dataset.train.images[torch.tensor([0])].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(
            section.name,
            dataset.num_classes,
            in_channels=channels,
            width=section.width,
            mean=section.mean,
            std=section.std,
        )
    if section.weights is not None:
        load_network_weights(model, section.weights, section.weights_density)
    return model


def is_exported(name: str) -> bool:
    """Whether a model's name is that of a file that `harprune export` made, or looks like one."""
    return Path(name).suffix.lower() == ".hpn" or artifact.recognised(name)


def exported(section: recipes.Model) -> Network:
    """The network of an exported file, with weights and normalisation of its own.

    Raises:
        ValueError: the file is none, or the recipe says what the file says.
    """
    for name in ("width", "mean", "std", "weights"):
        if getattr(section, name) is not None:
            raise ValueError(
                f"model.{name} is given, but {section.name} holds a whole network; leave it out"
            )
    return artifact.load(section.name)


def in_torch(made: Network, name: str, dataset: Dataset) -> nn.Module:
    """An exported network, of the file `name`, for the images of `dataset`.

    Raises:
        ValueError: it takes other images, or names too few classes.
    """
    channels, height, width = dataset.test.images[torch.tensor([0])].shape[1:]
    if made.input_shape[0] != channels or made.output_shape[0] < dataset.num_classes:
        raise ValueError(
            f"{name} makes {made.output_shape[0]} logits of {made.input_shape[0]} channels, but "
            f"the data have {dataset.num_classes} classes and {channels} channels; "
            "name the data it was trained for"
        )
    try:
        return Module(made.resized(height, width)).eval()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def load_network_weights(model: nn.Module, path: str, density: float | None = None) -> None:
    """Weights into a plain network: from a run's artifact, or a checkpoint of others.

    Args:
        density: what a checkpoint that holds others' scores was pruned for.
    """
    if density is None and checkpoint.is_checkpoint(path):
        load_artifact(model, path)
    else:
        load_weights(model, path, density=density)


def load_artifact(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The model in a run's artifact into a plain network, strictly; all tensors of the file.

    Raises:
        ValueError: a damaged file, or the artifact of another network.
    """
    tensors, _ = checkpoint.load(path)
    there = {name: tuple(t.shape) for name, t in checkpoint.unpack("model", tensors).items()}
    here = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    differing = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if differing:
        first = differing[0]
        raise ValueError(
            f"{path} does not fit the model in {len(differing)} tensors: {first} is "
            f"{there.get(first, 'absent')} in the file and {here.get(first, 'absent')} in the "
            "model; name the network, width, normalisation and data set it was trained with"
        )
    model.load_state_dict(checkpoint.unpack("model", tensors))
    return tensors


def fabric(section: recipes.Execution) -> Fabric:
    """The engine: device, precision, and data-parallel processes under `torchrun`."""
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    if section.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "execution.device = 'cuda', but torch sees no GPU; `harprune doctor` says why"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    engine = Fabric(
        accelerator=section.device,
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=section.precision,
    )
    engine.launch()
    if processes > 1:
        atexit.register(_part)
    return engine


def _part() -> None:
    """Leave the group of processes, and end its threads: a live one may abort the process."""
    if torch.distributed.is_initialized():
        gc.collect()  # wrappers that hold the group lie in cycles
        torch.distributed.destroy_process_group()


def threat(recipe: Recipe) -> Threat:
    """The threat model, at the authors' epsilon under parity."""
    if recipe.parity.epsilon:
        return Linf(_PARITY_EPSILON)
    return make_threat(recipe.threat.norm, recipe.threat.epsilon)


def step_size(recipe: Recipe, section: recipes.Objective) -> float:
    """The step of the training attack: as given, or a quarter of epsilon."""
    if recipe.parity.epsilon:
        return _PARITY_STEP
    if section.step_size is not None:
        return parse_epsilon(section.step_size)
    return threat(recipe).epsilon / 4.0


def twin(recipe: Recipe, model: nn.Module, dtype: torch.dtype | None = None) -> Twin | None:
    """The fixed function of `model`, on the backend of the recipe; None where it has none."""
    backend = Execution(recipe.execution.backend)
    return execution.twin(model, dtype=dtype, execution=backend)


@dataclass(frozen=True)
class OnTwin:
    """An attack on the model's twin: the same function, cheaper. `repr` stays the attack's."""

    attack: attacks.Attack
    twin: Twin

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.attack(self.twin.current(), x, y)

    def __repr__(self) -> str:
        return repr(self.attack)

    @property
    def passes(self) -> int:
        return self.attack.passes


@dataclass(eq=False)
class Once:
    """An attack that is run once a batch: a second pass meets the same adversarial images."""

    attack: attacks.Attack
    _batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self._batch is None or self._batch[0] is not x:
            self._batch = x, self.attack(model, x, y)
        return self._batch[1]

    def __repr__(self) -> str:
        return repr(self.attack)

    @property
    def passes(self) -> int:
        return self.attack.passes


def training_attack(
    recipe: Recipe, section: recipes.Objective, twin: Twin | None, **options
) -> attacks.Attack:
    """PGD as `section` has it, on `twin` where there is one; fgsm-rs takes one long step."""
    bound = threat(recipe)
    steps, step = section.steps, step_size(recipe, section)
    if section.name == "fgsm-rs":
        steps, step = 1, 1.25 * bound.epsilon
    attack = attacks.PGD(bound, steps, step_size=step, **options)
    return attack if twin is None else OnTwin(attack, twin)


def objective(
    recipe: Recipe,
    section: recipes.Objective,
    twin: Twin | None,
    teacher: nn.Module | None = None,
) -> objectives.Objective:
    """The training loss that `section` names, its attack run on `twin` where there is one.

    `teacher` is the dense network in eval mode, for a loss that distils from it.
    """
    pgd = partial(training_attack, recipe, section, twin)
    match section.name:
        case "natural":
            return objectives.Natural()
        case "pgd-at":
            return objectives.PGDAT(pgd(), clean_forward=recipe.parity.clean_forward)
        case "trades":
            return objectives.TRADES(
                pgd(**objectives.TRADES_ATTACK),
                beta=_beta(section, 6.0),
                clean_forward=recipe.parity.clean_forward,
            )
        case "mart":
            return objectives.MART(
                pgd(**objectives.MART_ATTACK),
                beta=_beta(section, 5.0),
                clean_forward=recipe.parity.clean_forward,
            )
        case "free":
            return objectives.Free(threat(recipe), replays=section.replays)
        case "fgsm-rs":
            return objectives.PGDAT(pgd())
        case "pwoa":
            return PwoA(teacher, **section.pwoa.model_dump())


def distilled(
    recipe: Recipe,
    section: recipes.Objective,
    twin: Twin | None,
    soft: recipes.Distillation,
    teacher: Callable[[Tensor], Tensor],
) -> objectives.RSLAD:
    """Distillation from `teacher` under the attack of the loss that `section` names.

    Raises:
        ValueError: a loss whose attack has a target of its own, or none.
    """
    if section.name not in ("pgd-at", "fgsm-rs"):
        raise ValueError(
            f"distillation takes its attack from pgd-at or fgsm-rs, not from objective.name = "
            f"{section.name!r}; name one of them, or leave out the stage's distillation"
        )
    divergence = objectives.SoftLabels(soft.temperature)
    attack = training_attack(recipe, section, twin, loss=divergence)
    return objectives.RSLAD(attack, teacher, divergence, soft.weight)


def attacked_once(objective: objectives.Objective) -> objectives.Objective:
    """`objective`, a second pass of which over the same batch does not attack anew."""
    if not hasattr(objective, "attack"):
        return objective
    return replace(objective, attack=Once(objective.attack))


def passes_again(objective: objectives.Objective) -> int:
    """Forward + backward passes per image of a second pass that does not attack anew."""
    attack = getattr(objective, "attack", None)
    return objective.passes - (0 if attack is None else attack.passes)


def _beta(section: recipes.Objective, usual: float) -> float:
    return usual if section.beta is None else section.beta


def method_notes() -> list[str]:
    """The options of every method with their defaults, a line each."""
    homes: dict[str, list[str]] = {}
    for name, kind in (METHODS | PLUG_INS).items():
        for option in (f for f in fields(kind) if f.init):
            default = "" if option.default is None else str(option.default).lower()
            homes.setdefault(f"{option.name} = {default}".strip(), []).append(name)
    return [f"{option}  # {', '.join(names)}" for option, names in homes.items()]


def method(recipe: Recipe) -> Method:
    """The pruning method with its options.

    Raises:
        ValueError: an unknown method or option (the nearest is named), or a bad value.
    """
    parity = recipe.parity
    kind, plug_ins = _kinds(recipe)
    known = _options(kind)
    wanted = {
        "train_batch_norm": parity.batch_norm_affine,
        "decay_scores": parity.score_decay,
        "decay_densities": parity.density_decay,
    }
    options = {name: True for name, on in wanted.items() if on and name in known}
    if parity.start_density and "start_density" in known:
        options["start_density"] = 0.1
    everyone = known.union(*map(_options, plug_ins))
    for name in recipe.method.options:
        if name not in everyone:
            near = get_close_matches(name, sorted(everyone), n=1, cutoff=0.0)
            hint = f"; the nearest known is 'method.{near[0]}'" if near else ""
            raise ValueError(f"unknown key 'method.{name}' of {recipe.method.name}{hint}")
    return _made(kind, {**options, **_given(recipe, kind)})


def sharpness(recipe: Recipe) -> S2AP | None:
    """The plug-in S2AP with its options, where the method's name asks for it.

    Raises:
        ValueError: a bad value, or a training without scores or without a second pass.
    """
    kind, plug_ins = _kinds(recipe)
    if S2AP not in plug_ins:
        return None
    if kind in _WITHOUT_SCORES or not getattr(method(recipe), "learn_scores", True):
        raise ValueError(
            f"method.name = {recipe.method.name!r}: s2ap perturbs scores, and this method trains "
            "none; leave it out"
        )
    if (recipe.prune.objective or recipe.objective).name == "free":
        raise ValueError(
            "objective.name = 'free' moves its images in every pass, and s2ap needs a second pass "
            "over the same; choose another objective"
        )
    return _made(S2AP, _given(recipe, S2AP))


def perturbation(recipe: Recipe, section: recipes.WeightTraining) -> AWP | None:
    """AWP, where a stage that trains weights asks for it.

    Raises:
        ValueError: a training without a second pass.
    """
    if section.awp is None:
        return None
    if (section.objective or recipe.objective).name == "free":
        raise ValueError(
            "objective.name = 'free' moves its images in every pass, and awp needs a second pass "
            "over the same; choose another objective"
        )
    return AWP(section.awp.radius, section.awp.warm_up)


def _kinds(recipe: Recipe) -> tuple[type[Method], list[type]]:
    """The classes behind `NAME+PLUG_IN`."""
    name, *extra = recipe.method.name.split("+")
    kind = METHODS.get(name) or _own_kind(name)
    for each in extra:
        if each not in PLUG_INS:
            raise ValueError(
                f"method.name = {recipe.method.name!r}: {each!r} is no plug-in; choose one of "
                f"{', '.join(PLUG_INS)}"
            )
    return kind, [PLUG_INS[each] for each in extra]


def _own_kind(name: str) -> type[Method]:
    """The user's own method that `module:Class` names."""
    if ":" not in name:
        raise ValueError(
            f"method.name = {name!r} is unknown; choose one of {', '.join(METHODS)}, or give your "
            "own as module:Class"
        )
    with current_directory_importable():
        kind = user_function(name, "method.name")
    if not (isinstance(kind, type) and issubclass(kind, Method) and is_dataclass(kind)):
        raise ValueError(
            f"method.name = {name!r} must be a dataclass derived from harprune.methods.base.Method"
        )
    return kind


def _options(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.init}


def _given(recipe: Recipe, kind: type) -> dict:
    """The recipe's options that are `kind`'s."""
    return {n: value for n, value in recipe.method.options.items() if n in _options(kind)}


def _made(kind: type, options: Mapping):
    """`kind` with typed options; a wrong one is named as the recipe has it."""
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(["method", *map(str, fault["loc"])])
        given = f" = {fault['input']!r}" if fault["loc"] else ""
        raise ValueError(f"{where}{given}: {fault['msg'].removeprefix('Value error, ')}") from None


def budget(recipe: Recipe, example: Tensor) -> Budget:
    """What may be kept; `example` is one image, for a budget in multiply-adds."""
    section = recipe.budget

    def multiply_adds(model: nn.Module, layers: Mapping) -> dict[str, int]:
        return costs.multiply_add_prices(model, layers, example.to(_device(model)))

    def mixed(model: nn.Module, layers: Mapping) -> dict[str, int]:
        images = example.to(_device(model))
        return costs.mixed_prices(model, layers, images, section.multiply_add_share)

    choices = {"multiply-adds": {"prices": multiply_adds}, "mixed": {"prices": mixed}}
    prices = choices.get(section.cost, {})
    bound = section.multiply_adds
    return Budget(
        density=section.density,
        allocation=allocate(section.allocation),
        granularity=Granularity(section.granularity),
        include=section.include,
        exclude=section.exclude,
        floor=section.floor,
        limit=None if bound is None else Limit(bound, multiply_adds),
        **prices,
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def allocate(name: str) -> allocation.Allocation:
    """An allocation by name, or from a JSON file."""
    if name in ALLOCATIONS:
        return ALLOCATIONS[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"budget.allocation = {name!r} is unknown; choose one of {', '.join(ALLOCATIONS)}, "
            "or a .json file of densities"
        )
    return allocation.read_allocation(name)


def attack(name: str, bound: Threat, *, seed: int = 0, batch_size: int = 250) -> attacks.Attack:
    """An evaluation attack by name: fgsm, pgd-N, cw-N, apgd-ce, apgd-dlr, autoattack.

    `seed` and `batch_size` are AutoAttack's; the others draw from the global generator.
    """
    base, _, number = name.partition("-")
    try:
        match base:
            case "fgsm" if not number:
                return attacks.FGSM(bound)
            case "pgd":
                return attacks.PGD(bound, int(number))
            case "cw":
                return attacks.PGD(bound, int(number), loss=attacks.Margin(kappa=50.0))
            case "apgd" if number in ("ce", "dlr"):
                loss = attacks.cross_entropy if number == "ce" else attacks.dlr
                return attacks.APGD(bound, loss=loss)
            case "autoattack" if not number:
                return AutoAttack(bound, batch_size=batch_size, seed=seed)
    except ValueError:
        pass
    raise ValueError(
        f"attack {name!r} is unknown; choose among fgsm, pgd-STEPS (as pgd-20), cw-STEPS, apgd-ce, "
        "apgd-dlr, autoattack"
    )


def batches(
    split: Split,
    recipe: Recipe,
    section: recipes.Training,
    engine: Fabric,
    seed: int,
    *,
    shared: bool = True,
) -> Batches:
    """The training batches of a stage, shared among the processes or whole for each of them."""
    augment = None
    if recipe.data.augmentation == "default":
        augment = default_augmentation(recipe.data.name, split.shape[-1])
    return Batches(
        split,
        section.batch_size,
        seed=seed,
        augment=augment,
        drop_last=True,
        device=engine.device,
        rank=engine.global_rank if shared else 0,
        world=engine.world_size if shared else 1,
    )


def optimiser(groups: list[dict], section: recipes.Training) -> torch.optim.Optimizer:
    """The optimiser of a stage over parameter groups, which may set their own weight decay."""
    if section.optimiser == "adamw":
        return torch.optim.AdamW(
            groups, lr=section.learning_rate, weight_decay=section.weight_decay
        )
    return torch.optim.SGD(
        groups,
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
