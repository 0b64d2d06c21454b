# SPDX-License-Identifier: Apache-2.0
"""Runtimes are compared on one network, and only where they agree."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from bench import deploy
from harprune.kernels import native
from harprune.pipeline import latency


def test_a_file_is_timed_beside_other_runtimes(command, finished):
    assert command("export", finished, "--out", "a.hpn").code == 0
    few = ["--runtime", "harprune", "--runtime", "torch", "--rounds", 2, "--batch", 1, "--batch", 3]
    said = command("bench", "deploy", "a.hpn", *few, "--no-processes", "--json", "--plot", "a.svg")
    assert said.code == 0 and said.err == ""
    rows = json.loads(said.out)
    assert [(r["runtime"], r["batch"]) for r in rows] == [
        ("harprune", 1), ("torch", 1), ("harprune", 3), ("torch", 3)
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["min"] <= row["milliseconds"] <= row["max"]
        assert row["reference"] == "torch" and row["rounds"] == 2 and row["threads"] == 1
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["milliseconds"])
    assert rows[1]["ratio"] == 1.0
    assert rows[0]["file_bytes"] == pytest.approx(Path("a.hpn").stat().st_size, rel=0.5)
    assert all(row["peak_bytes"] is None for row in rows)
    ElementTree.parse("a.svg")


def test_a_run_is_timed_as_it_would_be_exported(command, finished):
    said = command("bench", "deploy", finished, "--runtime", "harprune", "--rounds", 1)
    assert said.code == 0
    head, *lines, one, many = said.out.splitlines()
    assert head.split() == list(latency.COLUMNS) and len(lines) == 2
    peaks = [int(line.split()[-1]) for line in lines]
    assert 2**24 < min(peaks) <= max(peaks) < 2**27  # Python, NumPy and little else
    starts = [float(line.split()[-2]) for line in lines]
    assert min(starts) > 0.0 and max(starts) < 30.0
    assert "harprune" in lines[0] and one.startswith("ratio, batch 1: ")
    assert many == "ratio, batch 64: times the speed of harprune, in the same round"


def test_what_differs_or_is_unknown_is_not_timed(command, finished, monkeypatch):
    refusal = command("bench", "deploy", finished, "--runtime", "gpu").refusal
    assert "runtime 'gpu' is unknown; choose among harprune, harprune avx2" in refusal
    own = latency.RUNTIMES["torch"]

    def wrong(files, threads):
        made = own(files, threads)
        return latency.Candidate(lambda images: made.run(images) + np.float32(1.0), made.file)

    monkeypatch.setitem(latency.RUNTIMES, "torch", wrong)
    refusal = command("bench", "deploy", finished, "--runtime", "torch").refusal
    assert refusal.startswith("torch: its logits differ by")


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
    assert capsys.readouterr().out.split()[: len(deploy.COLUMNS)] == list(deploy.COLUMNS)
    ElementTree.parse(tmp_path / "a.svg")


@pytest.mark.skipif(native.named("avx2") is None, reason="needs a processor with AVX2")
def test_one_instruction_set_is_timed_but_only_where_asked(command, finished):
    asked = ["--runtime", "harprune", "--runtime", "harprune avx2", "--runtime", "torch"]
    few = ["--rounds", 1, "--batch", 1, "--no-processes", "--json"]
    rows = json.loads(command("bench", "deploy", finished, *few, *asked).out)
    assert [row["runtime"] for row in rows] == ["harprune", "harprune avx2", "torch"]
    assert {row["reference"] for row in rows} == {"torch"}
    usual = json.loads(command("bench", "deploy", finished, *few).out)
    assert "harprune avx2" not in [row["runtime"] for row in usual]
