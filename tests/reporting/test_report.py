# SPDX-License-Identifier: Apache-2.0
"""The report of one run: its numbers are those of the files, and it is the same each time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from harprune.intervals import paired_interval
from harprune.reporting.report import write_report
from harprune.reporting.tables import ABSENT


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cells(markdown: str, start: str) -> list[str]:
    """The cells of the table row that begins with `start`, bold or not."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    found = [[cell.strip().strip("*") for cell in row.strip("|").split("|")] for row in rows]
    return next(row for row in found if row[0] == start)


def percent(measure: dict) -> str:
    low, high = measure["interval"]
    return f"{100 * measure['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def test_the_result_table_says_what_the_files_say(make_run):
    folder = make_run()
    summary = write_report(folder)
    text = (folder / "report/report.md").read_text()
    records = {
        model: json.loads((folder / f"attack/{model}/evaluation.json").read_text())
        for model in ("dense", "finetuned")
    }
    names = {"clean accuracy": "clean", "pgd-20": "pgd-20"}
    names |= {"AutoAttack (the robust accuracy)": "autoattack"}
    for title, name in names.items():
        dense, finetuned = (
            {**record["attacks"], "clean": record["clean"]}[name] for record in records.values()
        )
        row = cells(text, title)
        assert row[1:3] == [percent(dense), percent(finetuned)]
        assert row[4] == "200"
        arrays = [np.load(folder / f"attack/{model}/outcomes.npz")[name] for model in records]
        lost, won = (int((a & ~b).sum()) for a, b in (arrays, arrays[::-1]))
        ends = paired_interval(lost, won, 200)
        shown = [float(number) for number in re.findall(r"[-+]\d+\.\d+", row[3])]
        assert shown == pytest.approx(
            [100 * (won - lost) / 200, 100 * ends[0], 100 * ends[1]], abs=0.006
        )
    audit = json.loads((folder / "audit.json").read_text())
    kept = cells(text, "prunable weights kept")
    assert kept[1:3] == [
        f"{audit['total']:,} / {audit['total']:,}",
        f"{audit['kept']:,} / {audit['total']:,}",
    ]
    assert summary["audit"]["kept"] == audit["kept"]
    fc = audit["layers"]["fc"]
    assert cells(text, "fc")[1:3] == [f"{fc['kept']:,}", f"{fc['total']:,}"]


def test_autoattack_comes_first_and_is_called_the_robust_accuracy(make_run):
    folder = make_run(attacks=("fgsm", "pgd-20", "autoattack"))
    summary = write_report(folder)
    assert [r["measure"] for r in summary["results"]] == [
        "clean",
        "autoattack",
        "fgsm",
        "pgd-20",
        "worst case",
    ]
    text = (folder / "report/report.md").read_text()
    assert "Robust accuracy (AutoAttack, 200 test images)" in text


def test_the_parts_of_autoattack_are_told(make_run):
    folder = make_run()
    write_report(folder)
    text = (folder / "report/report.md").read_text()
    assert "autoattack(); accuracy after its parts: apgd-ce 75.00, square " in text


def test_the_worst_case_is_paired_over_images_that_withstand_every_attack(make_run):
    folder = make_run()
    worst = [
        np.logical_and.reduce([arrays[name] for name in ("clean", "pgd-20", "autoattack")])
        for arrays in (np.load(folder / f"attack/{m}/outcomes.npz") for m in ("dense", "finetuned"))
    ]
    result = write_report(folder)["results"][-1]
    assert result["measure"] == "worst case"
    assert result["finetuned"]["correct"] == worst[1].sum()
    assert result["difference"]["won"] == (~worst[0] & worst[1]).sum()


def test_without_autoattack_no_number_is_called_robust(make_run):
    folder = make_run(attacks=("pgd-20",))
    write_report(folder)
    text = (folder / "report/report.md").read_text()
    assert "AutoAttack was not run: no number here is a robust accuracy" in text
    assert "Robust accuracy (" not in text


def test_the_same_folder_gives_the_same_bits(make_run):
    folder = make_run()
    write_report(folder)
    first = files_of(folder / "report")
    write_report(folder)
    assert files_of(folder / "report") == first
    assert {"report.json", "report.md", "report.html"} < first.keys()
    assert {f"plots/{n}.svg" for n in ("accuracy", "density", "prune", "validation")} < first.keys()


def test_the_returned_summary_is_the_json_file(make_run):
    folder = make_run()
    assert write_report(folder) == json.loads((folder / "report/report.json").read_text())


def test_failed_checks_and_flags_stand_at_the_top(make_run):
    folder = make_run(failing=("gradients",), flags=("Square gained 3 images",))
    summary = write_report(folder)
    assert [c["passed"] for c in summary["checks"]] == [False, False] + [True] * 5
    top, _, rest = (folder / "report/report.md").read_text().partition("## ")
    assert "check 'gradients' FAILED on the dense model: measured gradients" in top
    assert "flag raised on the dense model: Square gained 3 images" in top
    assert "2 of 7 failed" in rest
    assert "| **dense** | **gradients** | **FAILED** |" in rest


def test_what_stages_warned_of_stands_at_the_top(make_run):
    folder = make_run()
    assert write_report(folder)["warnings"] == []
    said = {"prune": ["layers are thin", "logits are cut off"], "pretrain": ["it guesses"]}
    (folder / "warnings.json").write_text(json.dumps(said))
    warnings = write_report(folder)["warnings"]
    assert [w["model"] for w in warnings] == ["dense", "pruned", "pruned"]
    for name in ("report.md", "report.html"):
        top, _, _ = (folder / "report" / name).read_text().partition("Result")
        assert top.index("the dense model: it guesses") < top.index("the pruned model: logits")


def test_keeping_more_than_the_budget_is_a_failed_check(make_run):
    folder = make_run()
    audit = json.loads((folder / "audit.json").read_text())
    (folder / "audit.json").write_text(json.dumps(audit | {"budget": audit["kept"] - 1}))
    failed = [c["check"] for c in write_report(folder)["checks"] if not c["passed"]]
    assert failed == ["budget"]


def checked(make_run, name: str, budget: dict, audit: dict) -> tuple[dict, str]:
    """The budget's checks of a run with these entries, and its report."""
    folder = make_run(name)
    for file, entries in (("recipe.json", {"budget": budget}), ("audit.json", audit)):
        held = json.loads((folder / file).read_text())
        for key, value in entries.items():
            held[key] = held[key] | value if isinstance(held.get(key), dict) else value
        (folder / file).write_text(json.dumps(held))
    found = write_report(folder)["checks"]
    checks = {c["check"]: (c["passed"], c["detail"]) for c in found if "budget" in c["check"]}
    return checks, (folder / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("cost", "unit"),
    [
        ("parameters", "prunable weights"),
        ("multiply-adds", "multiply-adds"),
        ("mixed", "mixed units of weights and multiply-adds"),
    ],
)
def test_the_budget_is_checked_in_its_own_unit(make_run, cost, unit):
    audit = {"budget": 75635, "spent": 75600}
    checks, text = checked(make_run, "within", {"cost": cost}, audit)
    assert checks == {"budget": (True, f"75,600 of 75,635 allowed {unit} kept")}
    assert f"; budget allows 75,635 {unit}, and 75,600 are spent." in text
    checks, _ = checked(make_run, "beyond", {"cost": cost}, audit | {"spent": 75636})
    assert checks == {"budget": (False, f"75,636 of 75,635 allowed {unit} kept")}


def test_the_second_bound_is_checked_too(make_run):
    budget, work = {"multiply_adds": 0.1}, {"dense": 10005, "kept": 1000}
    checks, text = checked(make_run, "within", budget, {"multiply_adds": work})
    assert checks["budget.multiply_adds"] == (True, "1,000 of 1,000 allowed multiply-adds kept")
    assert "; budget.multiply_adds allows 1,000 multiply-adds, and 1,000 are spent." in text
    checks, _ = checked(make_run, "beyond", budget, {"multiply_adds": work | {"kept": 1001}})
    assert [passed for passed, _ in checks.values()] == [False, True]
    checks, _ = checked(make_run, "without", {}, {"multiply_adds": work})
    assert list(checks) == ["budget"]


@pytest.mark.parametrize(
    ("budget", "title", "axis", "line"),
    [
        ({}, "5 % kept (95 % sparse)", "weights kept", "budget"),
        (
            {"cost": "mixed"},
            "5 % of a mix of weights and multiply-adds",
            "mixed cost kept",
            "budget",
        ),
        (
            {"cost": "multiply-adds", "multiply_adds": 0.1},
            "5 % of multiply-adds, at most 10 % of multiply-adds",
            "multiply-adds kept",
            "first of two bounds",
        ),
    ],
)
def test_what_the_budget_counts_is_said(make_run, budget, title, axis, line):
    folder = make_run("mine")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["budget"] |= budget
    (folder / "recipe.json").write_text(json.dumps(recipe))
    write_report(folder)
    assert (folder / "report/report.md").read_text().startswith(f"# mine: harp at {title}\n")
    drawn = (folder / "report/plots/prune.svg").read_text()
    assert f"<!-- {axis} -->" in drawn and f"<!-- {line} -->" in drawn


def test_an_audit_that_does_not_say_what_was_spent_is_still_read(make_run):
    work = {"budget": 900, "multiply_adds": {"dense": 10000, "kept": 901}}
    checks, _ = checked(make_run, "work", {"cost": "multiply-adds"}, work)
    assert checks == {"budget": (False, "901 of 900 allowed multiply-adds kept")}
    checks, text = checked(make_run, "mixed", {"cost": "mixed"}, work)
    assert checks == {}
    assert "; budget allows 900 mixed units of weights and multiply-adds." in text


@pytest.mark.parametrize(
    ("until", "missing", "drawn"),
    [
        ("pretrain", "prune, finetune, attack/dense, attack/finetuned", {"validation"}),
        ("prune", "finetune, attack/dense, attack/finetuned", {"density", "prune", "validation"}),
        ("finetune", "attack/dense, attack/finetuned", {"density", "prune", "validation"}),
    ],
)
def test_an_unfinished_run_is_reported_and_says_what_is_missing(make_run, until, missing, drawn):
    folder = make_run(until=until)
    summary = write_report(folder)
    text = (folder / "report/report.md").read_text()
    assert f"this run is not complete; missing: {missing}." in text
    assert set(summary["plots"]) == drawn
    assert "## Result" not in text
    assert cells(text, until)[1] == "finished"


def test_a_run_that_has_not_begun_is_reported(make_run):
    folder = make_run(until="pretrain")
    for name in ("metrics.jsonl", "environment.json", "dense.safetensors"):
        (folder / name).unlink()
    assert write_report(folder)["plots"] == {}
    assert cells((folder / "report/report.md").read_text(), "pretrain")[1:3] == ["not started", "0"]


def rewrite(path: Path, change) -> None:
    """`change` each record of a file of JSON lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_the_selected_epoch_is_shown_and_not_the_last(make_run):
    folder = make_run()

    def select(line: dict) -> dict:
        return line | {"selected": True} if (line["stage"], line["epoch"]) == ("prune", 1) else line

    rewrite(folder / "metrics.jsonl", select)
    stages = write_report(folder)["stages"]
    assert (stages["prune"]["selected"], stages["finetune"]["selected"]) == (1, None)
    text = (folder / "report/report.md").read_text()
    # After two of four epochs, and passes of all; where nothing is marked it is the last epoch.
    assert cells(text, "prune")[2:] == ["4", "2", ABSENT, ABSENT, "4,000"]
    assert cells(text, "before the cut to the budget")[4:6] == ["65.00", "35.00"]
    assert cells(text, "finetune")[2:5] == ["4", ABSENT, "90.00"]
    assert "<!-- selected epoch -->" in (folder / "report/plots/validation.svg").read_text()


def test_the_accuracies_of_a_stage_are_those_of_the_network_that_goes_on(make_run):
    folder = make_run(until="prune")
    left = {"prune": {"clean": 0.1, "robust": 0.05}, "finetune": {"clean": 1.0, "robust": 1.0}}
    (folder / "validation.json").write_text(json.dumps(left))
    stages = write_report(folder)["stages"]
    text = (folder / "report/report.md").read_text()
    assert cells(text, "prune")[4:6] == ["10.00", "5.00"]
    assert cells(text, "before the cut to the budget")[4:6] == ["90.00", "50.00"]
    assert stages["finetune"]["left"] is None  # of a stage that is to be made again
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    text = (folder / "report/report.md").read_text()
    assert cells(text, "prune")[4:6] == ["10.00", "5.00"]
    assert "| before the cut to the budget |" not in text


def test_a_method_without_gamma_is_reported(make_run):
    folder = make_run(method="hydra")
    learned = {"gamma", "penalty", "density", "densities", "budget_met"}
    rewrite(folder / "metrics.jsonl", lambda line: {k: line[k] for k in line.keys() - learned})
    assert "prune" not in write_report(folder)["plots"]


def test_an_evaluation_of_one_model_alone_is_reported(make_run):
    folder = make_run()
    for path in (folder / "attack/dense").iterdir():
        path.unlink()
    summary = write_report(folder)
    assert all(r["dense"] is None and r["difference"] is None for r in summary["results"])
    assert "missing: attack/dense." in (folder / "report/report.md").read_text()


def test_other_images_give_no_difference(make_run):
    folder = make_run()
    path = folder / "attack/dense/outcomes.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "index": arrays["index"] + len(arrays["index"])})
    assert all(result["difference"] is None for result in write_report(folder)["results"])


def test_a_layer_that_keeps_nothing_is_drawn(make_run):
    folder = make_run()
    audit = json.loads((folder / "audit.json").read_text())
    audit["kept"] -= audit["layers"]["fc"]["kept"]
    audit["layers"]["fc"]["kept"] = 0
    (folder / "audit.json").write_text(json.dumps(audit))
    write_report(folder)
    drawn = (folder / "report/plots/density.svg").read_text()
    assert "<!-- nothing kept -->" in drawn  # matplotlib notes each text beside its outlines


def test_a_network_that_keeps_nothing_is_drawn(make_run):
    folder = make_run()
    audit = json.loads((folder / "audit.json").read_text())
    for layer in audit["layers"].values():
        layer["kept"] = 0
    audit |= {"kept": 0, "density": 0.0, "allocations": {}}
    (folder / "audit.json").write_text(json.dumps(audit))
    rewrite(folder / "metrics.jsonl", lambda line: line | {"density": 0.0})
    write_report(folder)
    for name in ("density", "prune"):
        drawn = (folder / f"report/plots/{name}.svg").read_text()
        assert "<!-- nothing kept -->" in drawn
        assert max(map(float, re.findall(r"<!-- ([\d.]+) % -->", drawn))) <= 100


@pytest.mark.parametrize(
    ("name", "said"), [("a" * 48, "a" * 48), ("stage1." + "b" * 80 + ".2.conv", "stage1.")]
)
def test_long_names_leave_room_for_the_densities(make_run, name, said):
    """Where labels take all of a figure matplotlib warns, and here warnings are errors."""
    folder = make_run(layers={name: (8, 8), "fc": (10, 64)})
    write_report(folder)
    drawn = (folder / "report/plots/density.svg").read_text()
    (label,) = re.findall(r"<!-- (.{48}) -->", drawn)
    assert label.startswith(said) and label.endswith(name[-10:])


def test_of_many_layers_some_are_named(make_run):
    folder = make_run(layers={f"layer-{n}": (8, 8) for n in range(250)})
    write_report(folder)
    drawn = (folder / "report/plots/density.svg").read_text()
    named = re.findall(r"<!-- layer-(\d+) -->", drawn)
    assert named == [str(n) for n in range(0, 250, 3)]


@pytest.mark.parametrize(
    ("density", "labels"),
    [(0.1, ["10", "20", "50", "100"]), (1e-5, ["0.001", "0.01", "0.1", "1", "10", "100"])],
)
def test_a_long_logarithmic_axis_has_fewer_labels(make_run, density, labels):
    folder = make_run(until="prune")
    shrink = iter([1.0, 0.5, 2 * density, density])

    def learned(line: dict) -> dict:
        return line | ({"density": next(shrink)} if line["stage"] == "prune" else {})

    rewrite(folder / "metrics.jsonl", learned)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["budget"]["density"] = density
    (folder / "recipe.json").write_text(json.dumps(recipe))
    write_report(folder)
    drawn = (folder / "report/plots/prune.svg").read_text()
    assert set(re.findall(r"<!-- ([\d.]+) % -->", drawn)) <= set(labels)


def test_plots_are_well_formed_and_undated(make_run):
    folder = make_run()
    write_report(folder)
    for path in (folder / "report/plots").iterdir():
        ElementTree.fromstring(path.read_bytes())
        assert b"<dc:date>" not in path.read_bytes()


class Page(HTMLParser):
    """Collects a page's words, its pictures and the tags left open."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.words, self.images, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.images += [dict(attributes)] if tag == "img" else []
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(make_run):
    folder = make_run(flags=("<script>alert(1)</script>",))
    write_report(folder)
    text = (folder / "report/report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert "<script>alert(1)</script>" in page.words
    assert len(page.images) == 4
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)
    assert all(image["alt"] for image in page.images)
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_how_it_was_made_is_said(make_run):
    folder = make_run("mine", seed=7, until="pretrain")
    write_report(folder)
    text = (folder / "report/report.md").read_text()
    assert cells(text, "recipe")[1] == "mine"
    assert cells(text, "seed")[1] == "7"
    assert cells(text, "commit")[1] == "0123456789ab"
    assert cells(text, "versions")[1] == "harprune 0.1.0, torch 2.13.0"
    assert cells(text, "command")[1] == "harprune run recipes/mine.toml --out runs/mine"


def test_the_threat_is_that_of_the_attacks(make_run):
    folder = make_run()
    path = folder / "attack/finetuned/evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threat": "Linf(epsilon=0.031)"}))
    assert write_report(folder)["threat"] == {"norm": "linf", "epsilon": 0.031}
    assert "threat: norm linf, epsilon 0.031;" in (folder / "report/report.md").read_text()


def test_without_attacks_the_threat_is_that_of_the_recipe(make_run):
    folder = make_run(until="prune")
    assert write_report(folder)["threat"] == {"norm": "linf", "epsilon": "8/255"}
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | {"parity": {"epsilon": True}}))
    assert write_report(folder)["threat"]["epsilon"] == "of parity.epsilon"


@pytest.mark.parametrize(
    ("record", "threat"),
    [
        ("L2(epsilon=0.5)", {"norm": "l2", "epsilon": 0.5}),
        ("L2(epsilon=1.0)", {"norm": "l2", "epsilon": 1.0}),
        ("Linf(epsilon=1e-05)", {"norm": "linf", "epsilon": 1e-5}),
        ("Patch(size=3)", "Patch(size=3)"),
    ],
)
def test_a_threat_is_said_as_a_recipe_says_it(make_run, record, threat):
    folder = make_run()
    path = folder / "attack/finetuned/evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threat": record}))
    assert write_report(folder)["threat"] == threat


def test_nothing_but_the_report_is_left_behind(make_run):
    folder = make_run()
    before = files_of(folder)
    write_report(folder)
    after = files_of(folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("report/") for name in after.keys() - before.keys())
    assert not [name for name in after if Path(name).name.startswith(".")]
