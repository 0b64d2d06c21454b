# SPDX-License-Identifier: Apache-2.0
"""A run becomes a file, and no file that computes something else comes to stand in its place."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import harprune
from harprune import Format, Values
from harprune.delivery import export as module
from harprune.deploy import artifact, interchange
from harprune.models import create_model
from harprune.sparsity import masks
from harprune.sparsity.density import GivenDensity
from harprune.sparsity.layers import prunable_layers
from harprune.training import checkpoint


@pytest.fixture
def masked() -> nn.Module:
    model = create_model("small_cnn", 4, in_channels=1, width=8).eval()
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, GivenDensity(0.2)))
    return model


IMAGES = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def finetuned(run: Path) -> tuple[nn.Module, torch.Tensor]:
    """The network of a finished run, and images for it."""
    model = create_model("small_cnn", 4, in_channels=1, width=4)
    tensors, _ = checkpoint.load(run / "finetuned.safetensors")
    model.load_state_dict(checkpoint.unpack("model", tensors))
    return model.eval(), torch.rand(9, 1, 8, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", Format)
def test_a_network_that_diverged_is_refused(masked, tmp_path, value, format):
    masks.bake(masked)
    with torch.no_grad():
        list(prunable_layers(masked).values())[-1].parameter[0, 0] = value
    with pytest.raises(ValueError, match=r"not finite|infinite|NaN"):
        harprune.export(masked, tmp_path / "a", IMAGES, format=format)
    assert not (tmp_path / "a").exists()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 4))
    model.register_forward_pre_hook(lambda module, images: ((images[0] - 0.5) / 0.25,))
    return model


@pytest.mark.parametrize("format", [Format.ONNX, Format.TORCH])
def test_hooks_of_the_model_itself_are_written_with_it(format, tmp_path):
    written = harprune.export(hooked(), tmp_path / "a", IMAGES, format=format)
    assert "has hooks" in written.note and written.difference < 1e-5


def test_hooks_of_the_model_itself_do_not_fit_an_artifact(tmp_path):
    with pytest.raises(ValueError, match=r"the model itself \(Sequential\) has hooks"):
        harprune.export(hooked(), tmp_path / "a.hpn", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", Format)
def test_a_wrapper_is_refused_with_what_it_wraps(format, tmp_path):
    with pytest.raises(ValueError, match=r"is a DataParallel, .* give model\.module"):
        harprune.export(nn.DataParallel(hooked()), tmp_path / "a", IMAGES, format=format)


def test_other_logits_are_noticed_where_all_should_be_zero():
    x = np.zeros((3, 1), np.float32)
    assert module._compared(lambda x: np.zeros((len(x), 4)), x, np.zeros((3, 4)), 1e-4) == 0.0
    with pytest.raises(ValueError, match="differs from the given one"):
        module._compared(lambda x: np.full((len(x), 4), 5.0), x, np.zeros((3, 4)), 1e-4)
    with pytest.raises(ValueError, match=r"gives \(3, 5\) where"):
        module._compared(lambda x: np.zeros((len(x), 5)), x, np.zeros((3, 4)), 1e-4)


def test_a_run_becomes_an_artifact(command, finished):
    said = command("export", finished, "--out", "tiny.hpn")
    assert said.code == 0 and said.err == ""
    lines = said.out.splitlines()
    size = Path("tiny.hpn").stat().st_size
    assert lines[0].startswith(f"tiny.hpn: {size:,} bytes, ") and "times smaller" in lines[0]
    audit = json.loads((finished / "audit.json").read_text())
    assert lines[1].startswith(f"{audit['kept']:,} of {audit['total']:,} prunable weights kept")
    assert re.search(r"the same class on \d+ of \d+ images", lines[3])
    engine = harprune.deploy.load("tiny.hpn")
    model, x = finetuned(finished)
    with torch.no_grad():
        assert np.allclose(engine(x.numpy()), model(x).numpy(), atol=1e-4)
    assert engine.classes == ("a", "b", "c", "d")
    facts = engine.network.metadata
    assert facts["recipe"] == "tiny" and facts["kept"] == audit["kept"] and facts["seed"] == 0
    environment = json.loads((finished / "environment.json").read_text())
    assert facts["commit"] == environment["commit"]
    assert len(facts["recipe_sha256"]) == len(facts["weights_sha256"]) == 64


def test_a_network_of_which_all_matters_needs_no_line_about_it(tmp_path):
    network, path = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), tmp_path / "a.hpn"
    result = harprune.export(network, path, torch.rand(4, 1, 8, 8))
    kept = "256 of 256 prunable weights kept (100.000 %)"
    assert result.lines()[1] == kept and result.lines()[2].startswith("largest difference")
    assert repr(result) == f"Exported({path}: {path.stat().st_size:,} bytes, {kept})"
    with pytest.raises(
        ValueError, match="format = 'hpn' is unknown; choose one of artifact, onnx,"
    ):
        harprune.export(network, path, torch.rand(4, 1, 8, 8), format="hpn")


def test_export_can_be_repeated_and_replaces(command, finished):
    Path("a.hpn").write_text("something else")
    first = command("export", finished, "--out", "a.hpn", "--json")
    content = Path("a.hpn").read_bytes()
    again = command("export", finished / "finetuned.safetensors", "--out", "a.hpn", "--json")
    assert first.code == 0 and again == first
    assert Path("a.hpn").read_bytes() == content
    record = json.loads(first.out)
    assert record["bytes"] == len(content) and record["ratio"] > 1 and record["kept"] > 0


def test_halves_are_smaller(command, finished):
    sizes = {}
    for values in ("fp32", "fp16", "int8"):
        said = command("export", finished, "--out", "a.hpn", "--values", values, "--json")
        sizes[values] = json.loads(said.out)["bytes"]
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"]


def test_an_exported_network_is_attacked_as_the_model_is(command, finished):
    for values in ("fp32", "fp16"):
        command("export", finished, "--out", f"{values}.hpn", "--values", values)
    attack = ("--data", "stripes_of_tests:load", "--attack", "pgd-10", "--json")
    model = ("--model", "small_cnn", "--set", "model.width=4")
    wanted = command("evaluate", *model, "--weights", finished / "finetuned.safetensors", *attack)
    wanted = json.loads(wanted.out)
    for name in ("fp32.hpn", "fp16.hpn"):
        said = command("evaluate", "--model", name, *attack)
        assert said.code == 0, said.err
        found = json.loads(said.out)
        # Rounded otherwise, the attack may end elsewhere: one image of the 24.
        assert abs(found["clean"]["correct"] - wanted["clean"]["correct"]) <= 1
        resisted = [record["attacks"]["pgd-10"]["correct"] for record in (found, wanted)]
        assert abs(resisted[0] - resisted[1]) <= 1


def test_evaluating_an_exported_network_refuses_what_it_holds_itself(command, finished):
    command("export", finished, "--out", "tiny.hpn")
    arguments = ["evaluate", "--model", "tiny.hpn", "--data", "stripes_of_tests:load"]
    weights = [*arguments, "--weights", finished / "finetuned.safetensors"]
    assert command(*weights).refusal.startswith("model.weights is given, but tiny.hpn holds a who")
    other = command(*arguments[:-1], "digits").refusal
    assert other.startswith("tiny.hpn makes 4 logits of 1 channels, but the data have 10 classes")
    assert "none.hpn cannot be read" in command(*arguments[:2], "none.hpn", *arguments[3:]).refusal
    Path("garbled.hpn").write_text("no network")
    unread = command("evaluate", "--model", "garbled.hpn", "--data", "nowhere:load").refusal
    assert unread.startswith("garbled.hpn")
    Path("tiny.hpn").rename("renamed")
    renamed = command("evaluate", "--model", "./renamed", "--data", "digits").refusal
    assert renamed.startswith("./renamed makes 4 logits")
    pruned = command("run", "tiny.toml", "--set", "model.name=renamed", "--out", "r").refusal
    assert pruned.startswith("model.name = 'renamed' is an exported network, pruned for good")
    without = command("evaluate", "--model", "small_cnn", *arguments[3:]).refusal
    assert without.startswith("model.weights is missing: name the weights of small_cnn, or give")


def test_an_exported_network_that_flattens_a_map_is_attacked(command, here):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )
    harprune.export(model, "flat.hpn", torch.rand(2, 1, 8, 8))
    said = command("evaluate", "--model", "flat.hpn", "--data", "digits", "--attack", "fgsm")
    assert said.code == 0, said.err
    module = "stripes_of_tests:larger"
    other = command("evaluate", "--model", "flat.hpn", "--data", module).refusal
    assert other.startswith("flat.hpn: images of 12 x 12 do not fit this network")
    assert other.endswith("give 8 x 8")


def test_other_weights_need_a_model_and_data(command, finished):
    model, _ = finetuned(finished)
    torch.save(model.state_dict(), "plain.pt")
    arguments = ["export", "plain.pt", "--out", "a.hpn", "--model", "small_cnn"]
    assert "give both or none" in command(*arguments).refusal
    assert "neither a run folder" in command(*arguments[:-2]).refusal
    arguments += ["--data", "stripes_of_tests:load", "--set", "model.width=4"]
    assert command(*arguments).code == 0
    assert harprune.deploy.load("a.hpn").classes == ("a", "b", "c", "d")


def test_an_export_does_not_destroy_what_it_is_made_from(command, finished):
    before = (finished / "finetuned.safetensors").read_bytes()
    for name in ("finetuned.safetensors", "audit.json"):
        refusal = command("export", finished, "--out", finished / name).refusal
        assert refusal == f"--out {finished / name} would destroy what it is made from; name " + (
            "another file"
        )
    assert (finished / "finetuned.safetensors").read_bytes() == before
    model, _ = finetuned(finished)
    torch.save(model.state_dict(), "mine.pt")
    arguments = (
        "--model",
        "small_cnn",
        "--data",
        "stripes_of_tests:load",
        "--set",
        "model.width=4",
    )
    assert "would destroy" in command("export", "mine.pt", *arguments, "--out", "./mine.pt").refusal


def test_a_name_does_not_promise_another_format(command, finished):
    refusal = command("export", finished, "--out", "a.onnx").refusal
    assert refusal.startswith("a.onnx would be of format artifact") and "--format onnx" in refusal
    assert not Path("a.onnx").exists()


def test_names_of_formats_and_values_will_do_in_python(finished):
    model, images = finetuned(finished)
    for values in ("float16", "fp16"):
        harprune.export(model, "a.hpn", images.numpy(), format="artifact", values=values)
    with pytest.raises(ValueError, match="fp17"):
        harprune.export(model, "a.hpn", images, values="fp17")


@pytest.mark.parametrize("format", ["artifact", "onnx", "torch"])
def test_names_and_facts_travel_in_every_format(tmp_path, format):
    if format == "onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(4, 1, 8, 8)
    path = tmp_path / "made"
    given = {"format": format, "classes": ["cat", "dog", "eel"], "metadata": {"note": "zebra"}}
    for wrong in (
        {"classes": ["a"]},
        {"classes": ["a", "b", "\ud800"]},
        {"metadata": {"a": np.int64(3)}},
    ):
        with pytest.raises(ValueError, match=r"class name|no JSON"):
            harprune.export(model, path, x, **(given | wrong))
    assert not path.exists()
    harprune.export(model, path, x, **given)
    if format == "artifact":
        read = artifact.load(path)
        classes, facts = list(read.classes), read.metadata
    else:
        held = {"classes": "", "harprune": ""}
        if format == "torch":
            torch.export.load(path, extra_files=held)
        else:
            held = {p.key: p.value for p in onnx.load(path).metadata_props}
        classes, facts = json.loads(held["classes"]), json.loads(held["harprune"])
    assert classes == given["classes"] and facts["note"] == "zebra" and facts["kept"] == 192


def test_a_network_of_maps_is_told_what_logits_are(tmp_path):
    with pytest.raises(ValueError, match=r"gives \(1, 4, 6, 6\) for one image; it must give log"):
        harprune.export(nn.Sequential(nn.Conv2d(1, 4, 3)), tmp_path / "a", torch.rand(2, 1, 8, 8))


def test_spare_logits_have_no_names(command, here):
    (here / "spare_logits_of_tests.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels=1):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 2))\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).state_dict(), "spare.pt")
    arguments = ("--model", "spare_logits_of_tests:make", "--data", "stripes_of_tests:load")
    said = command("export", "spare.pt", *arguments, "--out", "spare.hpn")
    assert said.code == 0, said.err
    assert harprune.deploy.load("spare.hpn").classes == ()


def test_a_run_that_is_not_finished_says_so(command, here):
    assert command("run", "tiny.toml", "--out", "half", "--until", "prune").code == 0
    refusal = command("export", "half", "--out", "a.hpn").refusal
    assert "half holds no finetuned network yet" in refusal
    assert command("export", "half/pruned.safetensors", "--out", "a.hpn").code == 0
    assert "is a folder" in command("export", "half/pruned.safetensors", "--out", "half").refusal
    assert "neither a run folder" in command("export", "absent", "--out", "a.hpn").refusal


@pytest.mark.parametrize("values", list(Values))
def test_a_masked_model_stays_masked(masked, tmp_path, values):
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    result = harprune.export(
        masked, tmp_path / "a.hpn", IMAGES, values=values, metadata={"why": "a test"}
    )
    after = masked.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    plain = create_model("small_cnn", 4, in_channels=1, width=8).state_dict().values()
    assert result.dense_bytes == 4 * sum(t.numel() for t in plain if t.is_floating_point())
    assert result.difference <= module.TOLERANCES[values]
    assert harprune.deploy.load(tmp_path / "a.hpn").network.metadata["why"] == "a test"


def test_a_file_that_computes_something_else_is_not_kept(masked, tmp_path, monkeypatch):
    path = tmp_path / "a.hpn"
    path.write_text("what was there before")
    monkeypatch.setattr(module, "shrink", lambda network: _spoilt(network))
    with pytest.raises(ValueError, match=r"differs from the given one by .* nothing was kept"):
        harprune.export(masked, path, IMAGES)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


def _spoilt(network):
    name = next(iter(network.values))
    network.values[name][0] += 1.0
    return network, None


class Smooth(nn.Sequential):
    def __init__(self):
        layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU())
        super().__init__(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def test_an_operator_that_the_kernels_lack_is_named_and_onnx_offered(tmp_path):
    with pytest.raises(ValueError, match=r"\(GELU, in 0\.1\).*--format onnx") as error:
        harprune.export(Smooth(), tmp_path / "a.hpn", IMAGES)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_onnx_takes_what_the_kernels_lack(tmp_path):
    pytest.importorskip("onnxruntime")
    model, path = Smooth().eval(), tmp_path / "a.onnx"
    result = harprune.export(model, path, IMAGES, format=Format.ONNX)
    assert result.shrinkage is None and "GELU" in result.note
    found = interchange.run_onnx(path)(IMAGES.numpy())
    assert np.allclose(found, model(IMAGES).detach(), atol=1e-5)


def test_a_run_becomes_onnx_and_a_program(command, finished):
    pytest.importorskip("onnxruntime")
    model, x = finetuned(finished)
    with torch.no_grad():
        expected = model(x).numpy()
    for arguments, run, near in (
        (["--format", "onnx", "--values", "int8", "--out", "a.onnx"], interchange.run_onnx, 0.25),
        (["--format", "torch", "--out", "a.pt2"], interchange.run_program, 1e-4),
    ):
        said = command("export", finished, *arguments)
        assert said.code == 0 and said.err == "", said
        difference = np.abs(run(Path(arguments[-1]))(x.numpy()) - expected).max()
        assert difference < near * np.abs(expected).max()
    assert (
        "does not take values in float16"
        in command(
            "export", finished, "--format", "onnx", "--values", "fp16", "--out", "b.onnx"
        ).refusal
    )
    assert not Path("b.onnx").exists()
