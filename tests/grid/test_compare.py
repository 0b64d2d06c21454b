# SPDX-License-Identifier: Apache-2.0
"""A grid of runs: shared dense networks, cells that fail alone, and nothing done twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harprune.grid import compare
from harprune.grid.cells import cells_of, require_same_recipe
from harprune.grid.schema import Grid
from harprune.run.lock import in_use

GRID = """
title = "Stripes"
base = "tiny.toml"
densities = [0.3, 0.2]
seeds = [0, 1]
baseline = "one-shot"
[common]
finetune.epochs = 1
[methods.harp]
method = { name = "harp", gamma = 0.1 }
[methods.one-shot]
method.name = "magnitude"
budget.allocation = "lamp"
"""


RECIPES = Path(__file__).parents[2] / "recipes" / "compare"
SNIP = 'method.name = "snip"\npretrain.epochs = 0\n[methods.harp]'


@pytest.fixture
def grid(here) -> Path:
    path = here / "grid.toml"
    path.write_text(GRID)
    return path


def smaller(path: Path, more: str = "") -> Path:
    text = path.read_text().replace("[0.3, 0.2]", "[0.2]").replace("seeds = [0, 1]", "")
    path.write_text(text + more)
    return path


def files(folder: Path) -> dict[str, int]:
    found = sorted(folder.glob("*/*.safetensors"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_cells_are_the_product_and_share_dense_networks(grid, here):
    cells = cells_of(grid, here / "out", ["prune.epochs=1"])
    assert [cell.name for cell in cells[:4]] == [
        "dense-seed0", "dense-seed1", "harp-0.3-seed0", "one-shot-0.3-seed0"
    ]  # fmt: skip
    assert len(cells) == 2 + 2 * 2 * 2
    assert len({path for cell in cells for path in (cell.file, cell.said)}) == 2 * len(cells)
    for cell in cells[2:]:
        recipe, seed = cell.recipe, cell.recipe.seed
        assert cell.name == f"{cell.label}-{recipe.budget.density:g}-seed{seed}"
        assert recipe.model.weights == str(here / f"out/dense-seed{seed}/dense.safetensors")
        assert recipe.model.width == 4 and recipe.finetune.epochs == recipe.prune.epochs == 1
        assert recipe.method.name == ("harp" if cell.label == "harp" else "magnitude")
    attacked = [cell.name for cell in cells[2:] if cell.recipe.attack.dense]
    assert attacked == ["harp-0.3-seed0", "harp-0.3-seed1"]
    assert cells[2].recipe.budget.allocation != "lamp" == cells[3].recipe.budget.allocation


def test_the_printed_grid_is_a_grid(command, here):
    (here / "recipes").mkdir()
    (here / "tiny.toml").rename(here / "recipes" / "digits.toml")
    (here / "grid.toml").write_text(command("recipe", "--grid").out)
    names = [cell.name for cell in cells_of("grid.toml", here / "out")]
    assert names[0] == "dense-seed0" and len(names) == 1 + 3 * 2
    explained = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    assert all(f"| `{key}` |" in explained for key in Grid.model_fields)


def test_what_starts_from_random_weights_gets_no_dense_network(grid, here):
    text = smaller(grid).read_text().replace("[methods.harp]", "[methods.snip]\n" + SNIP, 1)
    grid.write_text(text)
    _, first, second, third = cells_of(grid, here / "out")
    assert first.recipe.model.weights is None and first.needs is None
    assert second.needs == third.needs == "dense-seed0"
    assert [cell.recipe.attack.dense for cell in (first, second, third)] == [False, True, False]


def test_what_only_training_has_is_not_asked_of_cells_without_it(grid, here):
    grid.write_text(GRID.replace("[common]", "[common]\nprune.distillation = {}\n"))
    one_shot = "budget.allocation = "
    smaller(grid).write_text(grid.read_text().replace(one_shot, f"prune.epochs = 0\n{one_shot}"))
    _, learned, ranked = cells_of(grid, here / "out")
    assert learned.recipe.prune.distillation is not None
    assert ranked.recipe.prune.distillation is None


def test_a_grid_is_no_recipe(grid, command, here):
    refusal = command("run", "grid.toml", "--out", "new").refusal
    assert refusal == "grid.toml is a grid, not a recipe; `harprune compare grid.toml` runs it"
    assert not Path("new").exists()


def test_weights_that_the_recipe_names_are_everybodys(grid, finished):
    weights = finished / "dense.safetensors"
    cells = cells_of(grid, finished.parent / "out", [f"model.weights={weights}"])
    assert len(cells) == 8 and {cell.recipe.model.weights for cell in cells} == {str(weights)}
    assert all(cell.needs is None for cell in cells)


def test_a_grid_runs_to_its_table_and_then_does_nothing(grid, command, here):
    smaller(grid, '[methods.wild]\nmethod.name = "magnitude"\nfinetune.learning_rate = 1e30\n')
    said = command("compare", grid, "--out", "out", "--jobs", 2)
    assert said.code == 1 and said.out == "out/comparison.md\n"
    assert said.err.splitlines()[-1].startswith("wild-0.2-seed0: finetune stopped: ")
    table = Path("out/comparison.md").read_text()
    for part in ("# Stripes", "| harp |", "| one-shot |", "## Missing", "wild-0.2-seed0"):
        assert part in table
    found = json.loads(Path("out/comparison.json").read_text())
    rows = {row["configuration"]: row for row in found["rows"]}
    assert set(rows) == {"dense", "harp", "one-shot"}
    assert rows["harp"]["seconds"][0] > 0 and rows["harp"]["passes"] > rows["one-shot"]["passes"]
    assert {pair["configuration"] for pair in found["paired"]} == {"harp", "dense"}
    before = files(Path("out"))
    assert len(before) == 1 + 2 * 3 + 2
    assert command("compare", grid, "--out", "out").code == 1  # tries the wild one again
    assert files(Path("out")) == before


def test_a_part_of_a_grid_is_the_same_cells(grid, command, here):
    grid.write_text(GRID.replace("seeds = [0, 1]", "").replace("harp]", "one]"))
    refused = command("compare", grid, "--out", "out", "--density", 0.25).refusal
    assert refused == f"--density of {grid} has no 0.25; choose among 0.3, 0.2"
    refused = command("compare", grid, "--out", "out", "--method", "two").refusal
    assert refused == f"--method of {grid} has no 'two'; choose among one, one-shot"
    part = ("compare", grid, "--out", "out", "--method", "one")
    assert command(*part, "--density", 0.3).code == 0
    table, to_come = Path("out/comparison.md"), "one-0.2-seed0, one-shot-0.2-seed0 | not run yet |"
    assert f"## Missing\n\n| run | why |\n| :-- | :-- |\n| one-shot-0.3-seed0, {to_come}" in (
        table.read_text()
    )
    assert "## Against one-shot\n\nThere is no finished run of one-shot yet.\n" in table.read_text()
    before = files(Path("out"))
    assert {path.split("/")[0] for path in before} == {"dense-seed0", "one-0.3-seed0"}
    assert command(*part).code == 0
    assert "\n| one-shot-0.3-seed0, one-shot-0.2-seed0 | not run yet |" in table.read_text()
    after = files(Path("out"))
    assert before.items() < after.items()
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"one-0.2-seed0"}
    assert list(Path("out").glob("*/attack/dense")) == [Path("out/one-0.3-seed0/attack/dense")]
    rows = json.loads(Path("out/comparison.json").read_text())["rows"]
    assert [(row["configuration"], row["density"]) for row in rows] == [
        ("dense", 1.0), ("one", 0.3), ("one", 0.2)
    ]  # fmt: skip


def test_a_part_of_a_grid_may_be_some_of_its_methods(grid, here):
    whole = cells_of(grid, here / "out")
    part = cells_of(grid, here / "out", methods=["one-shot"])
    assert [c.name for c in part] == [c.name for c in whole if c.label != "harp"]
    both = cells_of(grid, here / "out", densities=[0.2], methods=["one-shot", "harp"])
    assert {c.name for c in both} == {c.name for c in whole if "-0.3-" not in c.name}


def test_the_dense_network_is_attacked_in_each_part_of_a_grid(grid, here):
    for densities in ((), (0.2,), (0.3,)):
        cells = cells_of(grid, here / "out", densities=densities)
        attacked = [c for c in cells if c.until == "report" and c.recipe.attack.dense]
        assert len(attacked) == len({c.recipe.seed for c in cells})


def test_on_how_many_images_the_dense_network_is_attacked_is_said_where_it_is(grid, here):
    cells = cells_of(grid, here / "out", ["attack.dense_size=7"])
    for cell in cells:
        assert cell.recipe.attack.dense_size == (7 if cell.recipe.attack.dense else None)
    with pytest.raises(ValueError, match=r"dense_size = 7 has no effect with attack\.dense"):
        cells_of(grid, here / "out", ["attack.dense_size=7", "attack.dense=false"])
    last = cells[-1]  # it attacked the dense network where the methods had another order
    for name in ("attack/finetuned/evaluation.json", "attack/dense/evaluation.json"):
        (last.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (last.folder / name).touch()
    held = last.recipe.model_dump(mode="json")
    held["attack"] |= {"dense": True, "dense_size": 7}
    (last.folder / "recipe.json").write_text(json.dumps(held))
    (last.folder / "report").mkdir()
    (last.folder / "report/report.json").touch()
    require_same_recipe(last)


def test_a_dense_network_that_one_part_attacked_is_not_attacked_by_the_next(grid, here):
    held = here / "out/one-shot-0.2-seed0/attack/dense/evaluation.json"
    held.parent.mkdir(parents=True)
    held.touch()
    for densities, first in (
        ((), "harp-0.3-seed1"),
        ((0.3,), "harp-0.3-seed1"),
        ((0.2,), "harp-0.2-seed1"),
    ):
        cells = cells_of(grid, here / "out", densities=densities)
        attacked = {c.name for c in cells if c.until == "report" and c.recipe.attack.dense}
        assert attacked == {first} | {c.name for c in cells if c.folder in held.parents}


def test_a_cell_is_finished_when_its_dense_network_is_attacked_too(grid, here):
    dense, _, _, *others = cells_of(grid, here / "out", densities=[0.2])
    attacking = next(cell for cell in others if cell.recipe.attack.dense)
    other = next(cell for cell in others if not cell.recipe.attack.dense)
    for name in ("attack/finetuned/evaluation.json", "report/report.json"):
        for cell in (attacking, other):
            (cell.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (cell.folder / name).touch()
    assert other.finished and not attacking.finished
    (attacking.folder / "attack/dense").mkdir()
    (attacking.folder / "attack/dense/evaluation.json").touch()
    assert attacking.finished and not dense.finished


def test_a_grid_may_be_moved_and_named_otherwise(grid, command, here):
    smaller(grid)
    assert command("compare", grid, "--out", here / "out").code == 0
    (here / "out").rename(here / "moved")
    (here / "moved" / "harp-0.2-seed0" / "finetuned.safetensors").unlink()
    shutil.rmtree(here / "moved" / "harp-0.2-seed0" / "attack" / "finetuned")
    before = files(here / "moved")
    assert command("compare", grid, "--out", "moved").code == 0  # one cell goes on, one is finished
    after = files(here / "moved")
    name = "harp-0.2-seed0/finetuned.safetensors"
    assert before == {path: at for path, at in after.items() if path != name} and name in after
    later = ("--set", "execution.checkpoint_minutes=3", "--set", "data.folder=elsewhere")
    assert command("compare", grid, "--out", "moved", *later).code == 0
    assert files(here / "moved") == after


def test_what_a_damaged_file_of_times_does_not_say_is_unknown(tmp_path):
    times = tmp_path / "times.jsonl"
    entries = [{"cell": "a"}, {"cell": "a", "seconds": 2.5}, {"cell": "b"}, {"cell": "c"}]
    lines = [json.dumps(entry).encode() for entry in entries]
    times.write_bytes(b"\n".join([b"5", b"\xff{", *lines, b'{"cell": "b", "seconds": 1', b""]))
    assert compare._seconds(times) == {"a": 2.5}


def test_cells_stop_with_their_comparison(grid, here):
    smaller(grid)
    call = [sys.executable, "-m", "harprune", "compare", str(grid), "--out", "out"]
    more = ["--set", "pretrain.epochs=5000"]
    with subprocess.Popen([*call, *more], stderr=subprocess.PIPE, text=True) as process:
        while not (here / "out/dense-seed0/pretrain.progress").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().splitlines()[-1]
    assert process.returncode == 143
    assert said == "harprune: ended by SIGTERM; give the same command again to go on"
    assert not in_use(here / "out/dense-seed0")
    assert (here / "out/dense-seed0.log").read_text().splitlines()[-1] == said


def test_a_grid_without_attacks_measures_clean_images(grid, command, here):
    smaller(grid)
    assert command("compare", grid, "--out", "out", "--set", "attack.attacks=[]").code == 0
    before = files(Path("out"))
    assert command("compare", grid, "--out", "out", "--set", "attack.attacks=[]").code == 0
    assert files(Path("out")) == before


def test_a_grid_that_has_changed_is_refused(grid, command, here):
    smaller(grid)
    assert command("compare", grid, "--out", "out").code == 0
    before = files(Path("out"))
    said = command("compare", grid, "--out", "out", "--set", "attack.size=12")
    assert (
        "out/harp-0.2-seed0 holds a run of another recipe (attack.size: 16 -> 12)" in said.refusal
    )
    said = command("compare", grid, "--out", "out", "--set", "seed=3")
    assert "--set 'seed=3': the grid says this for each cell" in said.refusal
    (Path("out") / "harp-0.2-seed0/attack/finetuned/evaluation.json").unlink()
    assert command("compare", grid, "--out", "out").code == 0  # attacked again, and only that
    assert files(Path("out")) == before


@pytest.mark.slow
def test_a_killed_grid_goes_on(grid, here):
    call = [sys.executable, "-m", "harprune", "compare", str(grid), "--out", "out", "--jobs", "2"]
    finished: dict[str, int] = {}
    for _ in range(4):
        begun = subprocess.Popen(call, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(8)
        os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()
        found = files(here / "out")
        assert all(found[name] == at for name, at in finished.items())
        finished = found
    subprocess.run(call, check=True)
    found = files(here / "out")
    assert all(found[name] == at for name, at in finished.items()) and len(found) == 2 + 8 * 3
    assert "## Missing" not in (here / "out/comparison.md").read_text()


def test_a_cell_in_other_hands_is_waited_for(grid, command, here, monkeypatch):
    """As after a kill that left a child at work, or on a second machine."""
    monkeypatch.setattr(compare, "_PAUSE", 0.1)
    smaller(grid)
    (cell, *_) = cells_of(grid, here / "out")
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(3)"
    )
    cell.folder.mkdir(parents=True)
    program = [sys.executable, "-c", hold, str(cell.folder / ".lock")]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert in_use(cell.folder)
        assert command("compare", grid, "--out", "out").code == 0
        assert holder.wait() == 0
    assert not in_use(cell.folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('base = "tiny.toml"', "", "grid.toml: base: must be given"),
        ("[0.3, 0.2]", "0.3", "grid.toml: densities = 0.3: must be a list, as [1, 2] or "),
        (
            'base = "tiny.toml"',
            'base = "grid.toml"',
            "base = 'grid.toml' of grid.toml is itself a g",
        ),
        ('base = "tiny.toml"', 'base = "none.toml"', "base = 'none.toml' of grid.toml cannot be"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds = [1, 1]: must not name a value twice"),
        ("seeds = [0, 1]", "seed = 1", "unknown key 'seed'; the keys are title, note, base"),
        ('name = "harp"', 'name = "harq"', "method.name = 'harq' is unknown"),
        ("gamma = 0.1", "gama = 0.1", "gama"),
        ('baseline = "one-shot"', 'baseline = "two-shot"', "choose one of harp, one-shot"),
        ("[methods.one-shot]", "[methods.dense]", "'dense' is the network all start from"),
        ("[0.3, 0.2]", "[0.3, 0.30000001]", "two cells would be called 'harp-0.3-seed0'"),
        ('budget.allocation = "lamp"', "pretrain.epochs = 3", "of pretrain only epochs = 0"),
        ('budget.allocation = "lamp"', 'model.weights = "x"', "model.weights are the grid's"),
        ("finetune.epochs", "finetune.epoch", "unknown key 'finetune.epoch'"),
        ("[0.3, 0.2]", "[0.3, 1.5]", "budget.density = 1.5"),
    ],
)
def test_a_faulty_grid_is_refused_before_anything_runs(grid, command, here, old, new, said):
    assert old in GRID
    grid.write_text(GRID.replace(old, new))
    assert said in command("compare", "grid.toml", "--out", "out").refusal
    assert not (here / "out").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_grid_of_the_repository_compares_at_the_same_cost(path, tmp_path):
    cells = cells_of(path, tmp_path)
    dense = next(cell.recipe.pretrain.epochs for cell in cells if cell.until == "pretrain")
    spent = {
        cell.recipe.prune.epochs + cell.recipe.finetune.epochs + (dense if cell.needs else 0)
        for cell in cells
        if cell.until == "report"
    }
    assert len(spent) == 1 and spent.pop() > dense
