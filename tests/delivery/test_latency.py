# SPDX-License-Identifier: Apache-2.0
"""Runtimes are compared on one network, and only where they agree."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from bench import deploy
from harprune.delivery import latency, runtimes
from harprune.kernels import native
from harprune.reporting.tables import ABSENT
from harprune.run.console import Bar, Console


def test_a_file_is_timed_beside_other_runtimes(command, finished):
    assert command("export", finished, "--out", "a.hpn").code == 0
    few = ["--runtime", "harprune", "--runtime", "torch", "--rounds", 2, "--batch", 1, "--batch", 3]
    said = command("bench", "deploy", "a.hpn", *few, "--no-processes", "--json", "--plot", "a.svg")
    assert said.code == 0
    assert said.err == "harprune reads the network\ntorch reads the network\n"
    rows = json.loads(said.out)
    assert [(r["runtime"], r["batch"]) for r in rows] == [
        ("harprune", 1), ("torch", 1), ("harprune", 3), ("torch", 3)
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["min"] <= row["milliseconds"] <= row["max"]
        assert row["reference"] == "torch" and row["rounds"] == 2 and row["threads"] == 1
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["milliseconds"])
    assert rows[1]["ratio"] == 1.0
    assert rows[0]["kernels"] == native.best().name and rows[1]["kernels"] is None
    assert rows[0]["file_bytes"] == pytest.approx(Path("a.hpn").stat().st_size, rel=0.5)
    assert all(row["peak_bytes"] is None for row in rows)
    ElementTree.parse("a.svg")


def test_a_run_is_timed_as_it_would_be_exported(command, finished):
    said = command("bench", "deploy", finished, "--runtime", "harprune", "--rounds", 1)
    assert said.code == 0
    one, head, few, gap, many, _, more = said.out.splitlines()
    of = "at a time, 1 thread, median of 1 round; speed in times that of harprune"
    assert (one, gap, many) == (f"1 image {of}", "", f"64 images {of}")
    assert head.split()[:6] == ["runtime", "ms", "least", "most", "images/s", "speed"]
    for line in (few, more):
        name, *numbers = line.split()
        speed, size, start, peak = map(float, numbers[-4:])
        assert name == "harprune" and speed == 1.0 and 0.0 < start < 30.0
        assert size == pytest.approx(0.0034, abs=0.001)
        assert 17.0 < peak < 134.0  # Python, NumPy and little else


def test_a_process_that_fails_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(runtimes._LOADS, "torch", "raise OSError('no room for the program')")
    found = runtimes.started("torch", tmp_path / "absent", (1, 3, 8, 8), 1, Console())
    assert found == (None, None)
    assert "torch: a process of its own ended without an answer" in capsys.readouterr().err
    monkeypatch.setitem(runtimes._LOADS, "torch", "run = lambda images: None")
    seconds, peak = runtimes.started("torch", tmp_path / "absent", (1, 3, 8, 8), 1, Console())
    assert seconds >= 0 and peak > 0


@pytest.mark.parametrize("number, said", [
    (0.0012345, "0.00123"), (0.5, "0.500"), (12.345, "12.3"), (19532.1, "19,532"), (None, ABSENT),
])  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(number, said):
    row = dict.fromkeys(
        ("milliseconds", "min", "max", "images_per_second", "ratio", "start_seconds"), number
    )
    row |= {"runtime": "torch", "batch": 1, "threads": 2, "rounds": 3, "reference": "torch"}
    row |= {"file_bytes": 1.5e6, "peak_bytes": None}
    line = latency.lines([row])[-1]
    assert line.split() == ["torch", *[said] * 5, "1.50", said, ABSENT]


@pytest.mark.parametrize("name, said", [
    ("run", "run names no kind of picture; let it end in one of .svg, .pdf, .png"),
    ("a.jpg", "a.jpg names no kind of picture; let it end in one of .svg, .pdf, .png"),
    ("tiny.toml/a.svg", "/tiny.toml; name a file elsewhere"),
    ("made.svg", "made.svg is a folder; give the name of a file in it"),
])  # fmt: skip
def test_a_picture_that_cannot_be_is_refused_before_the_timing(
    command, finished, monkeypatch, name, said
):
    Path("made.svg").mkdir()
    monkeypatch.setattr(latency, "network_of", lambda source: pytest.fail("it was read"))
    assert said in command("bench", "deploy", finished, "--plot", name).refusal


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a/b.PDF", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_suffix_says_what_kind_of_picture(command, finished, name, start):
    few = ["--runtime", "harprune", "--rounds", 1, "--batch", 1, "--no-processes", "--plot", name]
    assert command("bench", "deploy", finished, *few).code == 0
    assert Path(name).read_bytes().startswith(start)


def test_it_says_how_far_it_is(command, finished, monkeypatch):
    seen = []
    monkeypatch.setattr(Bar, "update", lambda bar, done, text: seen.append((done, text)))
    few = ["--runtime", "harprune", "--runtime", "torch", "--rounds", 2, "--batch", 1, "--batch", 3]
    assert command("bench", "deploy", finished, *few, "--no-processes").code == 0
    turns = [f"batch {batch}, {name}" for batch in (1, 3) for name in ("harprune", "torch") * 2]
    assert seen == list(enumerate(turns, start=1))


def test_what_differs_or_is_unknown_is_not_timed(command, finished, monkeypatch):
    refusal = command("bench", "deploy", finished, "--runtime", "gpu").refusal
    assert "runtime 'gpu' is unknown; choose among harprune, harprune avx2" in refusal
    for other in ("tiny.toml", "absent.hpn"):
        refusal = command("bench", "deploy", other).refusal
        assert refusal.startswith(
            f"{other} is neither an .hpn file nor a run folder; `harprune exp"
        )
    own = runtimes.RUNTIMES["torch"]

    def wrong(files, threads):
        made = own(files, threads)
        return runtimes.Candidate(lambda images: made.run(images) + np.float32(1.0), made.file)

    monkeypatch.setitem(runtimes.RUNTIMES, "torch", wrong)
    fault = command("bench", "deploy", finished, "--runtime", "torch").last_line
    assert fault.startswith("torch: its logits differ by")


def test_a_runtime_that_is_not_there_is_left_out_with_a_word(command, finished, monkeypatch):
    def absent(files, threads):
        raise ModuleNotFoundError("No module named 'openvino'")

    some = {"openvino": absent, "harprune": runtimes.RUNTIMES["harprune"]}
    monkeypatch.setattr(runtimes, "RUNTIMES", some)
    few = ["--rounds", 1, "--batch", 1, "--no-processes"]
    said = command("bench", "deploy", finished, *few)
    assert said.code == 0 and len(said.out.splitlines()) == 3
    assert "openvino is left out (No module named 'openvino')" in said.err
    fault = command("bench", "deploy", finished, "--runtime", "openvino", *few).last_line
    assert fault == "runtime openvino cannot run here (No module named 'openvino')"


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--threads"])
def test_no_images_rounds_or_threads_are_refused(command, option):
    more = ("--batch", 1) if option == "--batch" else ()
    refusal = command("bench", "deploy", "a.hpn", *more, option, 0).refusal
    assert refusal.startswith(f"Invalid value for '{option}': ")
    assert refusal.endswith("1; see `harprune bench deploy --help`")


def test_the_benchmark_of_densities_runs(capsys, tmp_path):
    few = "--arch resnet18 --width 4 --density 0.3 --allocation erk --batch 1 --rounds 1"
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    deploy.main([*few.split(), "--no-processes", "--runtime", "harprune", "torch", *files])
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["runtime"] for row in rows] == ["harprune", "torch"]
    network, batch, *table = capsys.readouterr().out.splitlines()
    assert (
        network == f"resnet18 of width 4, 30 % kept (70 % sparse), erk: {rows[0]['kept']:,} weights"
    )
    assert [batch, *table] == [*latency.lines(rows), ""]
    ElementTree.parse(tmp_path / "a.svg")


@pytest.mark.skipif(native.named("avx2") is None, reason="needs a processor with AVX2")
def test_one_instruction_set_is_timed_but_only_where_asked(command, finished):
    asked = ["--runtime", "harprune", "--runtime", "harprune avx2", "--runtime", "torch"]
    few = ["--rounds", 1, "--batch", 1, "--no-processes", "--json"]
    rows = json.loads(command("bench", "deploy", finished, *few, *asked).out)
    assert [row["runtime"] for row in rows] == ["harprune", "harprune avx2", "torch"]
    assert {row["reference"] for row in rows} == {"torch"}
    assert [row["kernels"] for row in rows] == [native.best().name, "avx2", None]
    usual = json.loads(command("bench", "deploy", finished, *few).out)
    assert "harprune avx2" not in [row["runtime"] for row in usual]
