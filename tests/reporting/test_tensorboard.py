# SPDX-License-Identifier: Apache-2.0
"""Event files hold the epochs' numbers; without TensorBoard the way out is named."""

import json
import sys

import pytest

from harprune.reporting.tensorboard import write_tensorboard


def test_absence_names_the_extra(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'harprune\[tensorboard\]'"):
        write_tensorboard(make_run())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own imports
def test_scalars_are_those_of_metrics_and_are_not_doubled(make_run):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the extra harprune[tensorboard]",
    )
    folder = make_run()
    write_tensorboard(folder)
    logs = write_tensorboard(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = accumulator.EventAccumulator(str(logs / "prune"))
    events.Reload()
    for name in ("loss", "gamma", "density", "density/fc"):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        told = [line for line in lines if line["stage"] == "prune"]
        values = [line["densities"]["fc"] if name == "density/fc" else line[name] for line in told]
        assert read == [(k, pytest.approx(value)) for k, value in enumerate(values)]
    assert (
        "gamma"
        not in accumulator.EventAccumulator(str(logs / "pretrain")).Reload().Tags()["scalars"]
    )
