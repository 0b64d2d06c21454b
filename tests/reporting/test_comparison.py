# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: means over seeds, pairs of the same images, and refusals."""

import json
import re
import shutil
from statistics import mean, stdev

import numpy as np
import pytest

from harprune.reporting.comparison import compare_runs
from harprune.reporting.comparison_report import write_comparison

from .conftest import LAYERS


@pytest.fixture
def six_runs(make_run):
    return [
        make_run(f"{method}-{seed}", method=method, seed=seed, quality=quality)
        for method, quality in (("harp", 0.5), ("hydra", 0.4))
        for seed in range(3)
    ]


def accuracies(folders, attack: str, model: str = "finetuned") -> list[float]:
    found = []
    for folder in folders:
        record = json.loads((folder / f"attack/{model}/evaluation.json").read_text())
        found.append({**record["attacks"], "clean": record["clean"]}[attack]["accuracy"])
    return found


def test_seeds_are_averaged_with_their_sample_spread(six_runs):
    rows = compare_runs(six_runs)["rows"]
    assert [row["configuration"] for row in rows] == ["dense", "harp + erk", "hydra + erk"]
    for row, folders in zip(rows[1:], (six_runs[:3], six_runs[3:]), strict=True):
        assert row["seeds"] == [0, 1, 2]
        for name in ("clean", "autoattack", "pgd-20"):
            values = accuracies(folders, name)
            spread = (sum((v - mean(values)) ** 2 for v in values) / 2) ** 0.5
            assert row["measures"][name]["mean"] == pytest.approx(mean(values))
            assert row["measures"][name]["spread"] == pytest.approx(spread)
        audit = json.loads((folders[0] / "audit.json").read_text())
        assert (row["kept"], row["total"]) == ([audit["kept"]] * 3, audit["total"])


def test_the_same_dense_network_counts_once(six_runs):
    dense = compare_runs(six_runs)["rows"][0]
    assert dense["seeds"] == [0, 1, 2]
    assert dense["measures"]["autoattack"]["values"] == accuracies(
        six_runs[:3], "autoattack", "dense"
    )
    assert dense["kept"] == [dense["total"]] * 3


def test_densities_are_rows_of_their_own_and_one_seed_has_no_spread(make_run):
    folders = [make_run(f"at-{density}", density=density) for density in (0.1, 0.05)]
    rows = compare_runs(folders)["rows"]
    assert [row["density"] for row in rows] == [1.0, 0.1, 0.05]
    assert all(row["measures"]["clean"]["spread"] is None for row in rows)


def test_allocation_and_options_tell_configurations_apart(make_run):
    folders = [
        make_run("a", allocation=None),
        make_run("b", allocation="lamp"),
        make_run("c", options={"learn_scores": False}),
    ]
    names = [row["configuration"] for row in compare_runs(folders)["rows"][1:]]
    assert names == ["harp", "harp + lamp", "harp + erk (learn_scores=False)"]


def test_a_budget_in_multiply_adds_is_not_said_to_be_one_of_weights(make_run, tmp_path):
    runs = [make_run("a"), make_run("b"), make_run("c", density=0.1)]
    for run in runs[1:]:
        set_in_recipe(run, "budget", "cost", "multiply-adds")
    set_in_recipe(runs[1], "budget", "multiply_adds", 0.025)
    found = write_comparison(
        runs, tmp_path / "c.md", title="t", note="", command="c", baseline="dense"
    )
    names = [row["configuration"] for row in found["rows"][1:]]
    assert names == [
        "harp + erk",
        "harp + erk (cost=multiply-adds, multiply_adds=0.025)",
        "harp + erk (cost=multiply-adds)",
    ]
    budgets = [
        "5 % kept (95 % sparse)",
        "5 % of multiply-adds, at most 2.5 % of multiply-adds",
        "10 % of multiply-adds",
    ]
    text = (tmp_path / "c.md").read_text()
    for name, budget in zip(names, budgets, strict=True):
        assert text.count(f"| {name} | {budget} |") == 2 + 2  # result, costs, pairs
    drawn = (tmp_path / "c.svg").read_text()
    assert "<!-- 5 %, budgets differ -->" in drawn and "<!-- 10 % of multiply-adds -->" in drawn
    assert "share that the budget allows" in (tmp_path / "c-density.svg").read_text()
    assert "Difference to dense at the same share of what the budget counts" in text


def test_no_allocation_is_named_for_a_method_that_uses_none(make_run):
    runs = [make_run(str(seed), seed=seed, method="snip") for seed in range(2)]
    runs += [make_run("hydra", method="hydra"), make_run("plugged", method="snip+x")]
    set_in_recipe(runs[1], "budget", "allocation", "lamp")  # changes nothing, so need not agree
    rows = compare_runs(runs, without_allocation={"snip"})["rows"][1:]
    assert [row["configuration"] for row in rows] == ["snip", "hydra + erk", "snip+x"]
    assert rows[0]["seeds"] == [0, 1]


@pytest.mark.parametrize("baseline", ["hydra", "hydra + erk"])
def test_the_baseline_is_paired_seed_by_seed(six_runs, baseline):
    paired = [
        pair
        for pair in compare_runs(six_runs, baseline=baseline)["paired"]
        if pair["configuration"] != "dense"
    ]
    assert [(p["configuration"], p["seed"], p["measure"]) for p in paired] == [
        ("harp + erk", seed, measure) for seed in range(3) for measure in ("clean", "autoattack")
    ]
    for pair in paired:
        ours, theirs = (
            np.load(six_runs[pair["seed"] + offset] / "attack/finetuned/outcomes.npz")[
                pair["measure"]
            ]
            for offset in (0, 3)
        )
        assert pair["won"] == sum(a and not b for a, b in zip(ours, theirs, strict=True))
        assert pair["lost"] == sum(b and not a for a, b in zip(ours, theirs, strict=True))
        assert pair["difference"] == pytest.approx(ours.mean() - theirs.mean())


def test_dense_can_be_the_baseline(six_runs):
    paired = compare_runs(six_runs[:1], baseline="dense")["paired"]
    dense = accuracies(six_runs[:1], "autoattack", "dense")[0]
    pruned = accuracies(six_runs[:1], "autoattack")[0]
    assert paired[1]["difference"] == pytest.approx(pruned - dense)


def test_densities_are_paired_with_their_own(make_run):
    folders = [
        make_run(f"{method}-{density}", method=method, density=density)
        for method in ("harp", "hydra")
        for density in (0.1, 0.05)
    ]
    paired = compare_runs(folders, baseline="hydra")["paired"]
    for name in ("harp + erk", "dense"):
        densities = [p["density"] for p in paired if p["configuration"] == name]
        assert densities == [0.1, 0.1, 0.05, 0.05]


def test_the_dense_network_stands_beside_the_baseline(make_run):
    folders = [make_run("a", method="hydra"), make_run("b")]
    there = compare_runs(folders, baseline="hydra")["paired"]
    back = compare_runs(folders[:1], baseline="dense")["paired"]
    dense = [pair for pair in there if pair["configuration"] == "dense"]
    assert [(p["won"], p["lost"], p["size"]) for p in dense] == [
        (p["lost"], p["won"], p["size"]) for p in back
    ]


def test_a_dense_network_is_known_to_all_that_began_with_it(make_run):
    folders = [make_run(name, method=name) for name in ("harp", "hydra", "snip")]
    for folder, digest in zip(folders, ("w", "w", "v"), strict=True):
        (folder / "inputs.json").write_text(json.dumps({"dense network": digest}))
    record = folders[0] / "attack" / "dense" / "evaluation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": {"model": "w"}}))
    for folder in folders[1:]:
        shutil.rmtree(folder / "attack" / "dense")
    paired = compare_runs(folders, baseline="dense")["paired"]
    assert {p["configuration"] for p in paired} == {"harp + erk", "hydra + erk"}


def test_of_each_accuracy_the_dense_network_is_known_by_whoever_measured_it(make_run, tmp_path):
    """PGD on many images in one run, AutoAttack on fewer in another."""
    runs = [make_run("a"), make_run("b", method="hydra")]
    fewer = make_run("c", size=60) / "attack" / "dense"
    shutil.rmtree(runs[1] / "attack" / "dense")
    shutil.copytree(fewer, runs[1] / "attack" / "dense")
    for run in runs:
        (run / "inputs.json").write_text('{"dense network": "w"}')
        path = run / "attack" / "dense" / "evaluation.json"
        record = json.loads(path.read_text()) | {"identity": {"model": "w"}}
        if run is runs[0]:
            del record["attacks"]["autoattack"]
            outcomes = dict(np.load(path.with_name("outcomes.npz")))
            del outcomes["autoattack"]
            np.savez(path.with_name("outcomes.npz"), **outcomes)
        path.write_text(json.dumps(record))
    for baseline in ("dense", "hydra"):
        options = {"title": "t", "note": "", "command": "c", "baseline": baseline}
        found = write_comparison(runs, tmp_path / "c.md", **options)
        dense = found["rows"][0]
        assert (
            dense["measures"]["autoattack"]["mean"]
            == accuracies([runs[1]], "autoattack", "dense")[0]
        )
        assert dense["measures"]["clean"]["mean"] == accuracies([runs[0]], "clean", "dense")[0]
        sizes = {
            p["measure"]: p["size"]
            for p in found["paired"]
            if "dense" in (baseline, p["configuration"])
        }
        assert sizes == {"clean": 200, "autoattack": 60}
        assert dense["images"] == [60, 200]
        assert "<!-- dense (60 or 200 images) -->" in (tmp_path / "c.svg").read_text()


def test_a_dense_network_counts_once_and_on_most_images(make_run):
    folders = [make_run(f"run{seed}", seed=seed, size=60 if seed else 200) for seed in range(3)]
    for folder in folders[1:]:
        shutil.rmtree(folder / "attack" / "finetuned")
        shutil.copytree(folders[0] / "attack" / "finetuned", folder / "attack" / "finetuned")
    for folder, model in zip(folders, ("same", "same", "other"), strict=True):
        record = folder / "attack" / "dense" / "evaluation.json"
        said = json.loads(record.read_text())
        said["identity"] = {"model": model}
        record.write_text(json.dumps(said))
    dense = compare_runs(folders[:2])["rows"][0]
    assert (dense["seeds"], dense["images"]) == ([0], [200])
    assert dense["measures"]["clean"]["spread"] is None
    assert compare_runs(folders)["rows"][0]["seeds"] == [0, 2]


def test_a_dense_network_attacked_on_fewer_images(make_run, tmp_path):
    folder, few = make_run("run"), make_run("few", size=50)
    shutil.rmtree(folder / "attack" / "dense")
    shutil.copytree(few / "attack" / "dense", folder / "attack" / "dense")
    found = write_comparison(
        [folder], tmp_path / "c.md", title="t", note="", command="c", baseline="harp"
    )
    dense = found["rows"][0]
    assert dense["configuration"] == "dense" and dense["images"] == [50]
    assert found["protocol"]["images"] == 200
    assert {pair["size"] for pair in found["paired"]} == {50}
    assert "| dense (50 images) |" in (tmp_path / "c.md").read_text()


def attacked_by(run, digest: str) -> None:
    """Give the dense network that a run attacked an identity."""
    record = run / "attack" / "dense" / "evaluation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": {"model": digest}}))


def test_different_dense_networks_of_one_seed_are_rows_of_their_own(make_run, tmp_path):
    runs = [make_run(name, method=name) for name in ("harp", "hydra", "snip")]
    runs.append(make_run("other", seed=1))
    for run, digest in zip(runs, "aabc", strict=True):
        attacked_by(run, digest)
    # What only began with a network counts among its seeds as well.
    shutil.rmtree(runs[1] / "attack" / "dense")
    (runs[1] / "inputs.json").write_text('{"dense network": "a"}')
    rows = [row for row in compare_runs(runs)["rows"] if row["density"] == 1.0]
    names = ["dense of harp, hydra", "dense of snip", "dense of other"]
    assert [row["configuration"] for row in rows] == names
    assert [row["seeds"] for row in rows] == [[0], [0], [1]]
    write_comparison(runs, tmp_path / "c.md", title="t", note="", command="c", baseline="dense")
    assert "<!-- dense -->" not in (tmp_path / "c.svg").read_text()
    (pooled,) = [r for r in compare_runs([runs[0], runs[3]])["rows"] if r["density"] == 1.0]
    assert (pooled["configuration"], pooled["seeds"]) == ("dense", [0, 1])


def test_other_images_are_another_protocol(make_run):
    runs = [make_run("a"), make_run("b", method="hydra")]
    path = runs[1] / "attack" / "finetuned" / "outcomes.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "index": arrays["index"] + 1})
    with pytest.raises(ValueError, match=r"b was attacked on other test images than .*a; compare"):
        compare_runs(runs)
    path.unlink()
    assert compare_runs(runs)["protocol"]["images"] == 200  # nothing says that they differ
    for run, digest in zip(runs, "xy", strict=True):
        record = run / "attack" / "finetuned" / "evaluation.json"
        said = json.loads(record.read_text()) | {"identity": {"images": digest}}
        record.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="other test images"):
        compare_runs(runs)


def test_a_baseline_must_be_known_and_one(six_runs, make_run):
    with pytest.raises(
        ValueError, match="baseline 'admm' is not among the runs; choose one of: dense"
    ):
        compare_runs(six_runs, baseline="admm")
    other = make_run("lamp", method="hydra", allocation="lamp")
    with pytest.raises(ValueError, match=r"several .* hydra \+ erk, hydra \+ lamp"):
        compare_runs([*six_runs, other], baseline="hydra")


def test_refusals_name_the_folders(make_run):
    done = make_run("done")
    with pytest.raises(
        ValueError, match=r"half is not finished \(finetune, attack/finetuned missing\)"
    ):
        compare_runs([done, make_run("half", until="prune")])
    python = make_run("python", until="finetune")
    set_in_recipe(python, "data", "name", "given in python")
    with pytest.raises(ValueError, match=r"python is not finished \(attack/finetuned missing\)"):
        compare_runs([done, python])
    with pytest.raises(ValueError, match=r"done and .*again are both harp \+ erk at density 0\.05"):
        compare_runs([done, make_run("again")])
    with pytest.raises(ValueError, match=r"small has images 100 but .*done has 200"):
        compare_runs([done, make_run("small", seed=1, size=100)])
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_runs([])
    with pytest.raises(ValueError, match=r"end it in \.md"):
        write_comparison([done], done / "x.txt", title="t", note="", command="c")


def test_another_threat_is_another_protocol(make_run):
    runs = [make_run("a"), make_run("b", seed=1)]
    attacked_under(runs[1], f"Linf(epsilon={4 / 255!r})")
    with pytest.raises(ValueError, match="threat norm linf, epsilon 4/255 but"):
        compare_runs(runs)


def test_the_threat_is_that_of_the_attacks_not_of_the_recipe(make_run):
    usual, parity = make_run("usual"), make_run("parity", seed=1)
    attacked_under(usual, f"Linf(epsilon={8 / 255!r})")
    attacked_under(parity, "Linf(epsilon=0.031)")
    assert compare_runs([usual])["protocol"]["threat"] == {"norm": "linf", "epsilon": "8/255"}
    assert compare_runs([parity])["protocol"]["threat"] == {"norm": "linf", "epsilon": 0.031}
    with pytest.raises(
        ValueError, match=r"epsilon 0\.031 but .*usual has norm linf, epsilon 8/255"
    ):
        compare_runs([usual, parity])


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("budget", "floor", 0.2),
        ("finetune", "epochs", 3),
        ("data", "validation", 0.2),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(make_run, section, key, value):
    runs = [make_run("a"), make_run("b", seed=1)]
    set_in_recipe(runs[1], section, key, value)
    said = rf"b has {section}\.{key} = '?{value}'? but .*a has None, and both are harp \+ erk at"
    with pytest.raises(ValueError, match=said) as caught:
        compare_runs(runs)
    assert "\n" not in str(caught.value)


def test_the_first_difference_is_named_by_its_key_and_both_values(make_run):
    runs = [make_run("a"), make_run("b", seed=1)]
    for run, floor in zip(runs, (0.1, 0.2), strict=True):
        set_in_recipe(run, "budget", "floor", floor)
    with pytest.raises(ValueError, match=r"budget\.floor = 0\.2 but .* has 0\.1, an"):
        compare_runs(runs)


def test_what_is_no_part_of_the_experiment_may_differ_between_seeds(make_run):
    runs = [make_run("a"), make_run("b", seed=1)]
    free = [
        ("attack", "dense", False),
        ("model", "weights", "dense.safetensors"),
        ("data", "folder", "/elsewhere"),
        ("execution", "threads", 1),
    ]
    for key in free:
        for number, run in enumerate(runs):
            section, name, value = key
            set_in_recipe(run, section, name, value if number else None)
    assert compare_runs(runs)["rows"][1]["seeds"] == [0, 1]


def test_configurations_and_densities_may_differ_in_all_else(make_run):
    runs = [make_run("a"), make_run("b", method="hydra"), make_run("c", density=0.1)]
    for epochs, run in enumerate(runs):
        set_in_recipe(run, "finetune", "epochs", epochs)
    assert len(compare_runs(runs)["rows"]) == 4


def test_recipes_of_an_earlier_version_are_completed(make_run):
    runs = [make_run("a"), make_run("b", seed=1)]
    set_in_recipe(runs[1], "budget", "cost", "parameters")

    def complete(recipe):
        return {**recipe, "budget": {"cost": "parameters", **recipe["budget"]}}

    assert compare_runs(runs, complete=complete)["rows"][1]["seeds"] == [0, 1]


def test_another_width_is_another_protocol(make_run):
    runs = [make_run("a"), make_run("b", method="hydra")]
    assert "width" not in compare_runs(runs)["protocol"]
    set_in_recipe(runs[1], "model", "width", 8)
    for order in (runs, runs[::-1]):
        with pytest.raises(ValueError, match=r"has width (8|–) but"):  # noqa: RUF001
            compare_runs(order)
    set_in_recipe(runs[0], "model", "width", 8)
    assert compare_runs(runs)["protocol"]["width"] == 8


def set_in_recipe(run, section: str, key: str, value) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    recipe.setdefault(section, {})[key] = value
    (run / "recipe.json").write_text(json.dumps(recipe))


def attacked_under(run, threat: str) -> None:
    for path in run.glob("attack/*/evaluation.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"threat": threat}))


def test_the_written_files_agree_and_repeat_bit_by_bit(six_runs, tmp_path):
    out = tmp_path / "results" / "digits.md"
    given = {"title": "Digits", "note": "A note.", "command": "harprune report ..."}
    comparison = write_comparison(six_runs, out, **given, baseline="hydra")
    first = {path.suffix: path.read_bytes() for path in out.parent.iterdir()}
    assert set(first) == {".md", ".json", ".svg"}
    assert json.loads(first[".json"]) == comparison
    text = first[".md"].decode()
    for row in comparison["rows"]:
        robust = row["measures"]["autoattack"]
        assert f"{100 * robust['mean']:.2f} ± {100 * robust['spread']:.2f}" in text
        assert f"{row['kept'][0]:,} / {row['total']:,}" in text
    assert "5 % kept (95 % sparse)" in text
    assert "![Digits: clean and robust accuracy](digits.svg)" in text
    assert "harprune run recipes/hydra-2.toml --out runs/hydra-2\nharprune report ...\n```" in text
    write_comparison(six_runs, out, **given, baseline="hydra")
    assert {path.suffix: path.read_bytes() for path in out.parent.iterdir()} == first


def test_a_long_label_leaves_room_for_the_plots(make_run, tmp_path):
    """Where labels take all of a figure matplotlib warns, and here warnings are errors."""
    options = {f"option_{n}": n for n in range(9)}
    runs = [make_run(str(d), density=d, options=options) for d in (0.05, 0.1)]
    write_comparison(runs, tmp_path / "c.md", title="t", note="", command="c", baseline="harp")
    for name in ("c.svg", "c-density.svg", "c-strategies.svg"):
        drawn = (tmp_path / name).read_text()
        lines = re.findall(r"<!-- (.*?) -->", drawn, re.DOTALL)
        assert any(line.startswith("harp + erk") for line in lines)
        assert all(len(line) <= 32 for text in lines for line in text.split("\n"))


def test_a_baseline_named_by_its_method_stands_in_every_panel(make_run, tmp_path):
    runs = [
        make_run(f"{method}-{density}", method=method, density=density)
        for method in ("harp", "hydra")
        for density in (0.05, 0.1)
    ]
    for name, baseline in (("named", "hydra"), ("none", None)):
        out = tmp_path / f"{name}.md"
        write_comparison(runs, out, title="t", note="", command="c", baseline=baseline)
        drawn = (tmp_path / f"{name}-density.svg").read_text()
        assert ("<!-- hydra -->" in drawn) is (baseline is not None)  # in the legend


def test_a_layer_that_one_run_alone_prunes_is_drawn(make_run, tmp_path):
    """Others leave it whole, which is not 0 % kept."""
    fewer = {name: shape for name, shape in LAYERS.items() if name != "stem"}
    runs = [make_run("a", layers=fewer), make_run("b", method="hydra")]
    for name, compared in (("some", runs), ("all", runs[1:])):
        write_comparison(compared, tmp_path / f"{name}.md", title="t", note="", command="c")
        drawn = (tmp_path / f"{name}-strategies.svg").read_text()
        layers = re.findall(r"<!-- (stem|block.0.conv|fc) -->", drawn)
        assert layers == list(LAYERS) and "<!-- 0 -->" not in drawn
        assert ("hatched: not pruned" in drawn) is (name == "some")


def test_a_narrow_plot_is_as_high_below_a_long_legend(make_run, tmp_path):
    runs = [make_run(str(density), density=density) for density in (0.05, 0.1)]
    write_comparison(runs, tmp_path / "c.md", title="t", note="", command="c", baseline="harp")
    drawn = (tmp_path / "c-density.svg").read_text()
    panel = re.search(r'id="patch_2">\s*<path d="M \S+ (\S+) \nL \S+ \S+ \nL \S+ (\S+) ', drawn)
    assert float(panel[1]) - float(panel[2]) > 100  # points


def test_the_legend_names_only_attacks_that_were_run(make_run, tmp_path):
    for name, attacks in (("with", ("autoattack",)), ("without", ("pgd-20",))):
        run = make_run(name, attacks=attacks)
        write_comparison([run], tmp_path / f"{name}.md", title="t", note="", command="c")
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert ("<!-- AutoAttack -->" in drawn) is (name == "with")


def test_links_hold_where_a_name_has_spaces(make_run, tmp_path):
    out = tmp_path / "my table.md"
    write_comparison([make_run()], out, title="t", note="", command="c")
    assert "(my%20table.svg)" in out.read_text() and (tmp_path / "my table.svg").exists()


def test_an_attack_not_run_everywhere_is_said(make_run, tmp_path):
    runs = [make_run("a"), make_run("b", method="hydra", attacks=("pgd-20",))]
    out = tmp_path / "c.md"
    comparison = write_comparison(runs, out, title="t", note="", command="c")
    assert "autoattack" not in comparison["rows"][-1]["measures"]
    assert "| AutoAttack |" in out.read_text() and "not run" in out.read_text()


def test_an_attack_run_with_some_seeds_says_with_how_many(make_run, tmp_path):
    runs = [make_run(str(seed), seed=seed) for seed in range(2)]
    runs.append(make_run("2", seed=2, attacks=("pgd-20",)))
    given = {"title": "t", "note": "", "command": "c"}
    dense, row = write_comparison(runs, tmp_path / "c.md", **given)["rows"]
    robust = row["measures"]["autoattack"]
    assert (row["seeds"], robust["seeds"]) == ([0, 1, 2], [0, 1])
    assert robust["values"] == accuracies(runs[:2], "autoattack")
    assert dense["measures"]["autoattack"]["seeds"] == [0, 1]
    text = (tmp_path / "c.md").read_text()
    said = f"| {100 * robust['mean']:.2f} ± {100 * robust['spread']:.2f} (2 of 3 seeds) |"
    assert said in text and text.count("of 3 seeds") == 2


def test_an_attack_without_a_figure_has_no_column(make_run, tmp_path):
    runs = [
        make_run(f"{method}-{seed}", method=method, seed=seed, attacks=("pgd-20",))
        for method in ("harp", "hydra")
        for seed in (0, 1)
    ]
    out = tmp_path / "c.md"
    write_comparison(runs, out, title="t", note="", command="c", baseline="harp")
    text = out.read_text()
    assert "over seeds; none is AutoAttack's, so none is a robust accuracy." in text
    assert "![t: clean accuracy](c.svg)" in text
    assert "| configuration | budget | seeds | clean | pgd-20 | weights kept / total |" in text
    assert "| configuration | budget | clean | over seeds |\n" in text


def test_failed_checks_of_any_run_are_shown(make_run, tmp_path):
    run = make_run(failing=("gradients",))
    write_comparison([run], tmp_path / "c.md", title="t", note="", command="c")
    text = (tmp_path / "c.md").read_text()
    where = "harp + erk, 5 % kept (95 % sparse), seed 0, finetuned"
    assert f"**Warning:** {where}: check 'gradients' FAILED" in text


def test_what_a_stage_warned_of_is_shown(make_run, tmp_path):
    run = make_run()
    (run / "warnings.json").write_text('{"prune": ["2 layers are thin"]}')
    write_comparison([run], tmp_path / "c.md", title="t", note="", command="c")
    said = "harp + erk, 5 % kept (95 % sparse), seed 0, pruned: 2 layers are thin"
    assert f"**Warning:** {said}" in (tmp_path / "c.md").read_text()


def test_a_run_continued_by_other_code_names_both(make_run, tmp_path):
    run = make_run("one")
    path = run / "environment.json"
    environment = json.loads(path.read_text())
    environment["continued"] = [{**environment, "commit": "fedcba987654"}]
    path.write_text(json.dumps(environment))
    write_comparison(
        [run, make_run("two", seed=1)], tmp_path / "out.md", title="T", note="", command="c"
    )
    text = (tmp_path / "out.md").read_text()
    assert "| commit | 0123456789ab, then fedcba987654 | one |" in text
    assert "| commit | 0123456789ab | two |" in text


def test_many_warnings_are_a_table(make_run, tmp_path):
    runs = [make_run(f"run-{seed}", seed=seed, failing=("gradients",)) for seed in range(6)]
    found = write_comparison(runs, tmp_path / "c.md", title="t", note="", command="c")
    text = (tmp_path / "c.md").read_text()
    count = len({w["seed"] for w in found["warnings"]})
    assert f"{count} runs have warnings or failed checks; see Warnings and failed checks" in text
    table = text[text.index("## Warnings and failed checks") :]
    assert all(f"seed {w['seed']}, {w['model']}: check 'grad" in table for w in found["warnings"])


def test_seeds_are_pooled_against_the_baseline(six_runs, tmp_path):
    out = tmp_path / "c.md"
    found = write_comparison(six_runs, out, title="t", note="", command="c", baseline="hydra")
    found["paired"] = [p for p in found["paired"] if p["configuration"] != "dense"]
    pooled = {r["measure"]: r for r in found["pooled"] if r["configuration"] != "dense"}
    for name, row in pooled.items():
        each = [pair["difference"] for pair in found["paired"] if pair["measure"] == name]
        assert row["difference"] == pytest.approx(mean(each))
        assert row["spread"] == pytest.approx(stdev(each))
        assert row["seeds"] == [0, 1, 2]
        low, high = row["interval"]
        assert low < row["difference"] < high
    higher = sum(
        pair["difference"] > 0 for pair in found["paired"] if pair["measure"] == "autoattack"
    )
    text = out.read_text()
    assert f" | ± {100 * pooled['autoattack']['spread']:.2f} | {higher} of 3 |" in text
    assert "of the 4 here 0.2 miss the true difference on average. The tests" in text


def test_a_seed_alone_says_nothing_of_others(make_run, tmp_path):
    """One configuration has two seeds, the other one."""
    runs = [make_run("a"), make_run("b", method="hydra"), make_run("c", method="hydra", seed=1)]
    out = tmp_path / "c.md"
    found = write_comparison(runs, out, title="t", note="", command="c", baseline="dense")
    spreads = {row["configuration"]: row["spread"] is None for row in found["pooled"]}
    assert spreads == {"harp + erk": True, "hydra + erk": False}
    write_comparison(runs[:2], out, title="t", note="", command="c", baseline="dense")
    assert "of the 4 here 0.2 miss the true difference on average.\n" in out.read_text()


def test_of_many_runs_to_come_some_are_named(make_run, tmp_path):
    given = {"title": "t", "note": "", "command": "c", "to_come": [f"run-{n}" for n in range(7)]}
    write_comparison([make_run()], tmp_path / "c.md", **given, failed={"bad": "it broke"})
    named = ", ".join(f"run-{n}" for n in range(5))
    rows = f"| bad | it broke |\n| {named} and 2 more | not run yet |\n"
    assert rows in (tmp_path / "c.md").read_text()


def test_a_command_that_makes_the_runs_stands_alone(six_runs, tmp_path):
    out = tmp_path / "c.md"
    given = {"title": "t", "note": "", "command": "harprune compare GRID"}
    write_comparison(six_runs, out, **given, makes_runs=True)
    assert "```sh\nharprune compare GRID\n```" in out.read_text()


def test_counts_that_differ_over_seeds_are_a_range_and_minutes_a_median(make_run, tmp_path):
    runs = [make_run(str(seed), seed=seed) for seed in range(3)]
    counts = []
    for fewer, run in enumerate(runs):
        audit = json.loads((run / "audit.json").read_text())
        next(iter(audit["layers"].values()))["kept"] -= fewer
        audit["kept"] -= fewer
        (run / "audit.json").write_text(json.dumps(audit))
        counts.append(audit["kept"])
    out = tmp_path / "c.md"
    write_comparison(runs, out, title="t", note="", command="c", seconds=[60.0, 120.0, 6000.0])
    text = out.read_text()
    assert f"| {counts[2]:,} to {counts[0]:,} / " in text
    assert text.count("| 2.0 |") == 1
