# SPDX-License-Identifier: Apache-2.0
"""What a run sets up around its training: exact arithmetic, and a bar that shows what is said."""

import torch
from rich.console import Console as RichConsole

from harprune.pipeline import machinery
from harprune.pipeline.console import Bar
from harprune.pipeline.recipe_text import make_recipe


def test_convolutions_on_an_accelerator_are_not_shortened(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    machinery.fabric(make_recipe({"execution": {"device": "cpu"}}).execution)
    assert not torch.backends.cudnn.allow_tf32


def test_brackets_in_a_name_are_no_markup(tmp_path):
    for terminal in (True, False):
        path = tmp_path / str(terminal)
        with open(path, "w") as file:
            console = RichConsole(file=file, force_terminal=terminal, width=120, highlight=False)
            bar = Bar(console, "a [/b] name", 3, every=0.0)
            bar.update(0, "on [bold]")
            bar.update(2, "on [bold]")
            bar.close()
        assert "a [/b] name" in path.read_text()
