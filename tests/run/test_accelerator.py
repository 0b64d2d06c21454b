# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a device that is not the host: nothing strays, and a step waits for no value.

It is a pretended device, so that this is tested where there is no GPU; speed and numbers of a real
one are not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = 3
WITHIN = (1, 3, 4)
"""Of the five steps after a stage's first, those that neither begin it nor follow a validation."""

CASES = {
    "harp, whose kept weights alone are averaged and taught": (
        "finetune.averaging=0.9",
        "finetune.distillation={}",
    ),
    "hydra, at a point nearby, with a look at hidden layers": (
        "method.name=hydra+s2ap",
        "budget.allocation=lamp",
        "finetune.objective.name=pwoa",
    ),
    "flying bird, by gradients, on cropped images": (
        "method.name=flying-bird",
        "method.growth=gradient",
        "method.updates=1",
        "data.augmentation=crop_flip",
        "finetune.awp={}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stays_on_its_device_and_steps_wait_for_nothing(case, here):
    settings = (*CASES[case], 'attack.attacks=["pgd-2","apgd-ce","fgsm"]', "execution.threads=1")
    arguments = [part for setting in settings for part in ("--set", setting)]
    module = ("-m", "tests.run.pretended_accelerator")
    ran = subprocess.run(
        [sys.executable, *module, "run", "tiny.toml", "--out", "run", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, here)))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    assert (here / "run" / "report" / "report.html").exists()
    waits = json.loads(ran.stdout.splitlines()[-1])
    assert len(waits) == 5 * STAGES
    for stage in range(STAGES):
        assert [waits[5 * stage + step] for step in WITHIN] == [0, 0, 0], (stage, waits)
        assert waits[5 * stage + 2] > 0  # what is counted: validation reads values


def test_tensors_of_two_devices_do_not_meet():
    program = (
        "import torch\n"
        "from tests.run.pretended_accelerator import DEVICE, Everywhere\n"
        "with Everywhere():\n"
        "    torch.ones(2, device=DEVICE) + torch.ones(2)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "was given tensors of two devices" in ran.stderr
