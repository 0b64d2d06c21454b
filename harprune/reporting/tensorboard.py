# SPDX-License-Identifier: Apache-2.0
"""The curves of a run as TensorBoard event files, for those who live there."""

from pathlib import Path

from harprune.reporting.records import Epoch, read_run

_SCALARS = ("loss", "clean", "robust", "learning_rate", "density", "gamma", "penalty")


def write_tensorboard(run_folder: str | Path) -> Path:
    """Write the run's epochs into `report/tensorboard/`, one log per stage; returns that folder.

    Raises:
        ValueError: TensorBoard is not installed, or `run_folder` is no run folder.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "tensorboard is not installed; install it with: pip install 'harprune[tensorboard]'"
        ) from None
    run = read_run(run_folder)
    folder = run.folder / "report" / "tensorboard"
    for stage in dict.fromkeys(epoch.stage for epoch in run.epochs):
        for old in (folder / stage).glob("events.out.tfevents.*"):
            old.unlink()  # TensorBoard would draw the old curve over the new one
        with SummaryWriter(str(folder / stage)) as writer:
            for epoch in run.of_stage(stage):
                for name, value in _scalars(epoch).items():
                    writer.add_scalar(name, value, epoch.epoch)
    return folder


def _scalars(epoch: Epoch) -> dict[str, float]:
    """The epoch's numbers by name; densities of layers under `density/`."""
    found = {name: getattr(epoch, name) for name in _SCALARS}
    found |= {f"density/{layer}": value for layer, value in (epoch.densities or {}).items()}
    return {name: value for name, value in found.items() if value is not None}
