# SPDX-License-Identifier: Apache-2.0
"""What to do: a recipe, read from TOML, checked at the door, and never changed afterwards.

Every field has its meaning beside it; `harprune recipe` prints them all with their defaults. A
value may be overridden by `--set section.key=value`, the value again in TOML.
"""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from harprune.kernels import Backend

Epsilon = float | str


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        # Pydantic would take true for 1.
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("must be a number")
        return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


class Data(Section):
    """The images."""

    name: str = "digits"
    """digits, cifar10, cifar100, svhn, mnist, fashion_mnist, tiny_imagenet, folder, or
    module:function."""
    folder: str | None = None
    """Where the files lie; $HARPRUNE_DATA or the user's cache when absent (see `harprune data`)."""
    image_size: int | None = Field(default=None, ge=1, le=1024)
    """Side in pixels, 1 to 1024, to which the images of a folder are scaled and cropped."""
    validation: float | int = Field(default=0.1, gt=0)
    """Share (below 1) or number of training images held out to select epochs on."""
    augmentation: Literal["default", "crop_flip", "none"] = "default"
    """The data set's usual augmentation: crop_flip, random crops and flips, for CIFAR, Tiny
    ImageNet and folders, none for digits, clothes and images of your own."""

    @field_validator("name")
    @classmethod
    def _as_known(cls, name: str) -> str:
        return name if ":" in name else name.lower().replace("-", "_")


class Model(Section):
    """The network."""

    name: str = "small_cnn"
    """A name that `harprune doctor` lists, module:function, torchvision:NAME or timm:NAME."""
    width: int | None = Field(default=None, ge=1)
    """Channels of the first stage; the architecture's usual number when absent."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, which the network's input is normalised with; with `std`, or neither.
    It is part of the model. Images stay as they are when absent."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""
    weights: str | None = None
    """A robust dense network to start from (safetensors or a torch state dict)."""
    weights_density: float | None = Field(default=None, gt=0, le=1)
    """Where `weights` holds HYDRA's or HARP's scores: the density that they stand for."""


class Threat(Section):
    """What an attacker may do, in training and in evaluation."""

    norm: Literal["linf", "l2"] = "linf"
    """The norm that bounds the perturbation."""
    epsilon: Epsilon = "8/255"
    """Its radius, for images in [0, 1]; a number or a fraction in quotes."""

    @field_validator("epsilon")
    @classmethod
    def _radius(cls, value: Epsilon, info: ValidationInfo) -> Epsilon:
        from harprune.robustness.threat import make_threat

        make_threat(info.data.get("norm", "linf"), value)
        return value


class PwoA(Section):
    """Options of pwoa: distillation from the dense network and the HSIC bottleneck."""

    temperature: float = Field(default=30.0, gt=0)
    """By which the logits of both networks are divided."""
    alpha: float = Field(default=10.0, ge=0)
    """Weight of the distillation."""
    lambda_x: float = Field(default=2e-5, ge=0)
    """Weight of what hidden layers know of the image."""
    lambda_y: float = Field(default=1e-4, ge=0)
    """Weight of what they know of the label."""
    sigma: float = Field(default=5.0, gt=0)
    """Width of the Gaussian kernels."""


class Objective(Section):
    """The training loss."""

    name: Literal["natural", "pgd-at", "trades", "mart", "free", "fgsm-rs", "pwoa"] = "pgd-at"
    """Which loss."""
    steps: int = Field(default=10, ge=1)
    """Steps of the training attack (pgd-at, trades, mart)."""
    step_size: Epsilon | None = None
    """Its step; a quarter of epsilon when absent."""
    beta: float | None = Field(default=None, ge=0)
    """Weight of the robust term; 6 in trades and 5 in mart when absent."""
    replays: int = Field(default=4, ge=1)
    """Steps on each batch in free adversarial training."""
    pwoa: PwoA = PwoA()

    @field_validator("step_size")
    @classmethod
    def _step(cls, value: Epsilon | None) -> Epsilon | None:
        from harprune.robustness.threat import parse_epsilon

        if value is not None:
            parse_epsilon(value)
        return value


class Training(Section):
    """One training stage."""

    epochs: int = Field(default=100, ge=0)
    """Passes over the training images; 0 skips the training of the stage."""
    batch_size: int = Field(default=128, ge=1)
    """Images per optimiser step, over all processes."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of the weights and of batch norm. Scores and densities have none unless parity
    says so; but rst always decays its scores, as its paper does."""
    schedule: Literal["cosine", "one_cycle", "steps", "constant"] = "cosine"
    """How the learning rate changes with progress; "steps" divides it by 10 at a
    half and at three quarters of the way."""
    objective: Objective | None = None
    """The loss of this stage; the recipe's [objective] when absent."""


class WeightPerturbation(Section):
    """Adversarial weight perturbation (AWP)."""

    radius: float = Field(default=0.005, gt=0)
    """Length of the perturbation as a fraction of the weights', layer by layer."""
    warm_up: float = Field(default=0.0, ge=0, lt=1)
    """Share of the stage that passes first, without perturbation."""


class WeightTraining(Training):
    """A stage that trains weights, not a selection among them."""

    averaging: float | None = Field(default=None, ge=0, lt=1)
    """Decay per optimiser step of an average of the weights, as 0.999; this
    network is then validated, selected and kept. The last step's own when absent."""
    awp: WeightPerturbation | None = None
    """Take each gradient where the weights nearby are worst (AWP), at one more pass a step; its
    keys are radius, as a fraction of the weights (0.005), and warm_up, the share of the stage
    without it (0). Off when absent."""


class Distillation(Section):
    """Learning from the dense network's answers in place of labels (RSLAD)."""

    weight: float = Field(default=5 / 6, ge=0, le=1)
    """Share of the attacked images in the loss; the clean ones have the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens the answers that are compared."""


class Distilled(Training):
    """A stage that comes after a dense network."""

    distillation: Distillation | None = None
    """Learn from the dense network's answers (RSLAD) under the attack of pgd-at or fgsm-rs; its
    keys are weight, of attacked images (5/6), and temperature (1). From labels when absent."""


class Pretrain(WeightTraining):
    """Dense robust training; skipped when model.weights is given."""


class Prune(Distilled):
    """The method's own training: in HARP of scores and densities, and if it says so of weights."""

    epochs: int = Field(default=20, ge=0)
    """Passes over the training images."""


class Finetune(WeightTraining, Distilled):
    """Training of the kept weights under fixed masks."""

    learning_rate: float = Field(default=0.01, gt=0)
    """Peak learning rate."""


class Budget(Section):
    """What may be kept."""

    density: float = Field(default=0.1)
    """Fraction kept, strictly between 0 and 1: 0.01 keeps 1 %."""
    allocation: str = "erk"
    """uniform, erk, lamp, igq, global, or a JSON file {layer: density}."""
    granularity: Literal["weight", "filter", "channel"] = "weight"
    """What is kept or dropped together."""
    cost: Literal["parameters", "multiply-adds", "mixed"] = "parameters"
    """What the budget counts; mixed is both in one currency, see `multiply_add_share`."""
    multiply_add_share: float = Field(default=0.5, ge=0, le=1)
    """With cost mixed, the weight of multiply-adds against parameters."""
    multiply_adds: float | None = Field(default=None, gt=0, le=1)
    """A second bound: at most this fraction of the dense network's multiply-adds."""
    include: tuple[str, ...] | None = None
    """Name patterns of the layers to prune; all weight layers when absent."""
    exclude: tuple[str, ...] = ()
    """Name patterns of layers to leave dense."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Least density of a layer, as a fraction of `density`."""

    @field_validator("density")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0.0 < value < 1.0:
            raise ValueError("must lie strictly between 0 and 1; 0.01 keeps 1 % of the weights")
        return value


class Method(Section):
    """The pruning method; further keys are the method's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_finite)]] = Field(init=False)

    name: str = "harp"
    """One that `harprune doctor` lists, with +s2ap where it trains scores, or module:Class."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Validation(Section):
    """How epochs are selected."""

    size: int | None = Field(default=1000, ge=1)
    """Validation images attacked after each epoch, at most."""
    steps: int = Field(default=10, ge=1)
    """Steps of the PGD attack that selects the epoch."""


class Attack(Section):
    """The final evaluation, the only one that sees test images."""

    attacks: tuple[str, ...] = ("pgd-20", "autoattack")
    """fgsm, pgd-STEPS, cw-STEPS, apgd-ce, apgd-dlr, autoattack."""
    size: int | None = Field(default=None, ge=1)
    """Test images, drawn by `seed`; the complete test set when absent."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Draws the subset and starts the attacks."""
    batch_size: int = Field(default=250, ge=1)
    """Images attacked at a time, and the grain of resuming (of AutoAttack each of its parts)."""
    dense: bool = True
    """Attack the dense network as well, for comparison."""
    dense_size: int | None = Field(default=None, ge=1)
    """At most so many of these images for the dense network, which costs the most."""


class Execution(Section):
    """Where and how the computation runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an accelerator if there is one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Number format of training."""
    attack_precision: Literal["32", "bf16"] = "32"
    """Number format inside training attacks; bf16 is a different, cheaper attack, on the twin."""
    backend: Backend = "auto"
    """What runs masked networks on a CPU: the sparse kernels where they are built, or torch."""
    twin: bool = True
    """Attack an equivalent of the model with batch norm folded and masks multiplied out, or where
    false the model itself. Validation during training uses the equivalent whatever is said here."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores when absent. Another number may change the last bits."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Also checkpoint inside an epoch after so many minutes."""


class Parity(Section):
    """Hidden choices of HARP's released code, each off by default (docs/parity.md)."""

    density_decay: bool = False
    """Weight decay on the density logits."""
    score_decay: bool = False
    """Weight decay on the scores."""
    clean_forward: bool = False
    """A clean batch passes in training mode before each adversarial step (pgd-at, trades and mart,
    where they learn from labels)."""
    batch_norm_affine: bool = False
    """Scale and shift of batch norm train while pruning."""
    cosine_offset: bool = False
    """The cosine lags one epoch."""
    epsilon: bool = False
    """Epsilon 0.031 and step 0.0078 instead of 8/255 and 2/255; refused beside another epsilon or
    step."""
    start_density: bool = False
    """Densities start from a strategy at 0.1, whatever the target."""


class Recipe(Section):
    """One experiment."""

    name: str = "unnamed"
    """Shown in reports."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides initialisation, validation split, order, augmentation and training noise."""
    data: Data = Data()
    model: Model = Model()
    threat: Threat = Threat()
    objective: Objective = Objective()
    budget: Budget = Budget()
    method: Method = Method()
    pretrain: Pretrain = Pretrain()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    validation: Validation = Validation()
    attack: Attack = Attack()
    execution: Execution = Execution()
    parity: Parity = Parity()
