# SPDX-License-Identifier: Apache-2.0
"""Evaluation: its numbers, its folder after an interruption, its refusals and its checks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from harprune.intervals import wilson
from harprune.outcomes import WORST_CASE, load_evaluation, paired
from harprune.robustness import sanity
from harprune.robustness.attacks import APGD, FGSM, PGD, Margin
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.evaluation import evaluate
from harprune.robustness.images import subset
from harprune.robustness.threat import L2, Linf

THREAT = Linf(0.02)
ATTACKS = {"fgsm": FGSM(THREAT), "pgd-5": PGD(THREAT, 5), "apgd-ce": APGD(THREAT, 6, 2)}


@pytest.fixture
def images():
    return torch.rand(50, 3, 6, 6)


@pytest.fixture
def labels(model, images):
    y = model(images).argmax(1)
    y[::7] = (y[::7] + 1) % 5
    return y


@pytest.fixture
def run(model, images, labels):
    """evaluate() on the shared model and images, batches of 16, no checks unless told."""

    def call(attacks=ATTACKS, *, net=model, x=images, y=labels, **options):
        return evaluate(net, x, y, attacks, **{"batch_size": 16, "checks": False, **options})

    return call


def same(a, b):
    assert a.outcomes.keys() == b.outcomes.keys()
    return a == b and all(np.array_equal(v, b.outcomes[k]) for k, v in a.outcomes.items())


def test_the_numbers_count_the_outcomes(run, model, images, labels):
    result = run()
    clean = (model(images).argmax(1) == labels).numpy()
    assert np.array_equal(result.outcomes["clean"], clean)
    assert result.clean.correct == clean.sum() == 42 and result.clean.accuracy == 42 / 50
    for name, measure in result.attacks.items():
        standing = result.outcomes[name]
        assert not (standing & ~clean).any()
        assert (measure.correct, measure.size) == (standing.sum(), 50)
        assert measure.interval == wilson(int(standing.sum()), 50)
        per_class = [standing[labels.numpy() == k].mean() for k in labels.unique().numpy()]
        assert measure.balanced == pytest.approx(sum(per_class) / len(per_class))
        assert measure.attack == repr(ATTACKS[name])
    worst = np.logical_and.reduce([result.outcomes[name] for name in ATTACKS])
    assert 0 < result.worst_case.correct == worst.sum() < 42
    assert np.array_equal(result.outcome(WORST_CASE), worst)


def test_each_batch_is_attacked_in_eval_mode_where_it_was_right(run, model, images, labels):
    seen = []

    def spy(net, x, y):
        assert not net.training and (net(x).argmax(1) == y).all()
        seen.append(len(x))
        return x

    model.train()
    result = run({"spy": spy})
    assert model.training and sum(seen) == 42 and len(seen) == 4
    assert result.attacks["spy"].accuracy == result.clean.accuracy


def test_an_attack_does_not_depend_on_the_others_nor_on_the_global_seed(run):
    state = torch.get_rng_state()
    together = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    alone = run({"pgd-5": ATTACKS["pgd-5"]})
    assert np.array_equal(alone.outcomes["pgd-5"], together.outcomes["pgd-5"])


def test_the_seed_starts_the_attacks(run):
    noise = {"noise": lambda net, x, y: torch.rand_like(x)}
    first, again, other = (run(noise, seed=s).outcomes["noise"] for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_each_batch_draws_its_own_random_numbers(run):
    drawn = []

    def noise(net, x, y):
        drawn.append(float(torch.rand(())))
        return x

    run({"noise": noise})
    assert len(set(drawn)) == 4


def test_images_may_be_anything_indexable_and_a_subset(run, images, labels):
    class Lazy:
        def __getitem__(self, index):
            assert isinstance(index, torch.Tensor)
            return images[index]

    index = subset(labels, 20, 3)
    result = run(x=Lazy(), index=index, num_classes=5, threat=THREAT)
    assert np.array_equal(result.outcomes["index"], index.numpy())
    assert np.array_equal(result.outcomes["labels"], labels[index].numpy())
    assert result.size == 20 and result.threat == repr(THREAT)


def test_autoattack_tells_what_each_part_left(run, model, images, labels):
    attack = AutoAttack(Linf(0.1))
    result = run({"aa": attack})
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(result.attacks["aa"].parts) == names
    for part in names:
        standing = result.outcomes[f"aa:{part}"]
        assert result.attacks["aa"].parts[part] == standing.mean()
    assert np.array_equal(result.outcomes["aa:square"], result.outcomes["aa"])
    assert result.outcome("aa").sum() == result.attacks["aa"].correct


def test_what_autoattack_warns_of_is_kept(run, labels):
    class Soft(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :5].softmax(1)

    x = torch.rand(6, 3, 6, 6)
    net = Soft()
    result = run({"aa": AutoAttack(Linf(1.0))}, net=net, x=x, y=net(x).argmax(1))
    assert result.flags == ("aa: probabilities instead of logits",)
    assert any("flag: aa" in line for line in result.lines())


# --- folders ---


def stop_after(count):
    """A progress callback that raises like Ctrl-C, and the calls it saw."""
    calls = []

    def progress(done, total, text):
        calls.append((done, total, text))
        if len(calls) == count:
            raise KeyboardInterrupt

    return progress, calls


@pytest.mark.parametrize("stop", [1, 4, 5, 11, 17, 20, 21, 24])
def test_an_interrupted_evaluation_goes_on_bit_for_bit(run, tmp_path, stop, brief):
    # From the 17th call on they are AutoAttack's, whose four parts are saved each for itself.
    attacks = {**ATTACKS, "aa": AutoAttack(Linf(0.02))} if stop > 16 else ATTACKS
    whole = run(attacks, checks=True, folder=tmp_path / "whole")
    progress, calls = stop_after(stop)
    with pytest.raises(KeyboardInterrupt):
        run(attacks, checks=True, folder=tmp_path / "parts", progress=progress)
    assert os.listdir(tmp_path / "parts") == ["partial.npz"]
    torch.manual_seed(17)
    progress, later = stop_after(-1)
    resumed = run(attacks, checks=True, folder=tmp_path / "parts", progress=progress)
    assert len(calls) + len(later) == 4 * (1 + len(attacks)) + (16 if stop > 16 else 0)
    assert not set(calls) & set(later)
    assert same(resumed, whole)
    assert sorted(os.listdir(tmp_path / "parts")) == ["evaluation.json", "outcomes.npz"]
    for name in ("evaluation.json", "outcomes.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_between_the_last_two_files_is_mended(run, tmp_path):
    whole = run(folder=tmp_path / "whole")
    progress, _ = stop_after(16)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "parts", progress=progress)
    (tmp_path / "parts" / "outcomes.npz").write_bytes(
        (tmp_path / "whole" / "outcomes.npz").read_bytes()
    )
    assert same(run(folder=tmp_path / "parts"), whole)


def test_a_finished_evaluation_is_read_not_repeated(run, tmp_path):
    def fails_later(net, x, y):
        assert not (tmp_path / "evaluation.json").exists()
        return x

    first = run({"a": fails_later}, folder=tmp_path, checks=True)
    assert same(run({"a": fails_later}, folder=tmp_path, checks=True), first)
    assert same(load_evaluation(tmp_path), first)


def test_reading_a_finished_evaluation_adds_nothing_to_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr("harprune.robustness.evaluation.square_gain", lambda *_: 1.0)
    first = run(folder=tmp_path)
    written = (tmp_path / "evaluation.json").read_bytes()
    assert any("Square took" in flag for flag in first.flags)
    run(folder=tmp_path)
    assert (tmp_path / "evaluation.json").read_bytes() == written


def test_checks_can_be_added_to_a_finished_evaluation(run, tmp_path):
    assert not run(folder=tmp_path).checks
    assert run(folder=tmp_path, checks=True).checks
    assert load_evaluation(tmp_path).checks


def test_a_folder_of_something_else_is_refused(run, model, images, labels, make_network, tmp_path):
    run(folder=tmp_path)
    other = [
        ("model", {"net": make_network()}),
        ("data", {"index": torch.arange(30)}),
        ("data", {"y": labels.roll(1)}),
        ("data", {"x": images.flip(0)}),
        ("seed", {"seed": 5}),
        ("batch_size", {"batch_size": 10}),
        ("attacks", {"attacks": {**ATTACKS, "fgsm": FGSM(L2(0.1))}}),
        ("attacks", {"attacks": {"fgsm": FGSM(THREAT)}}),
        ("attacked function", {"twin": model}),
        ("threat", {"threat": L2(0.1)}),
    ]
    for key, options in other:
        with pytest.raises(ValueError, match=f"whose {key} differs") as caught:
            run(**options, folder=tmp_path)
        assert "\n" not in str(caught.value)
    progress, _ = stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "partial", progress=progress)
    with pytest.raises(ValueError, match="whose seed differs"):
        run(folder=tmp_path / "partial", seed=1)


def test_the_last_image_counts_as_much_as_the_first(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sanity, "SAMPLE", 8)
    run(folder=tmp_path)
    with pytest.raises(ValueError, match="whose images differs"):
        run(x=torch.cat([images[:-1], 1 - images[-1:]]), folder=tmp_path)


def test_an_earlier_record_that_does_not_say_what_was_attacked_goes_on(run, tmp_path):
    first = run(folder=tmp_path)
    path = tmp_path / "evaluation.json"
    record = json.loads(path.read_text())
    del record["identity"]["attacked function"]
    path.write_text(json.dumps(record))
    assert same(run(folder=tmp_path), first)


def test_the_record_is_what_a_report_reads(run, tmp_path):
    result = run(folder=tmp_path, checks=True, threat=THREAT, name="dense")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["model"] == "dense" and record["threat"] == repr(THREAT)
    assert (record["seed"], record["size"]) == (0, 50)
    assert record["attacks"]["fgsm"]["correct"] == result.attacks["fgsm"].correct
    assert set(record["attacks"]["fgsm"]) >= {"accuracy", "interval", "balanced", "size", "attack"}
    assert set(record["checks"]["eval mode"]) == {"passed", "detail"}
    with np.load(tmp_path / "outcomes.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"index", "labels", "clean", *ATTACKS}
        assert all(arrays[name].shape == (50,) for name in arrays.files)
        assert arrays["fgsm"].dtype == bool


ANEW = "restore it, or delete evaluation.json and repeat the command, which attacks anew"


def test_garbled_files_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="no finished evaluation"):
        load_evaluation(tmp_path)
    (tmp_path / "partial.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"partial\.npz is garbled .*; restore it, or delete it"):
        run(folder=tmp_path)
    partway = '{"identity": {}, "partway": ["aa", 0, ["fab-t"], []]}'
    for note in ({}, *({"progress": text} for text in ("{", "[]", "{}", '{"a": 1}', partway))):
        np.savez(tmp_path / "partial.npz", clean=np.ones(50, bool), **note)
        with pytest.raises(ValueError, match=r"partial\.npz is garbled .* or delete it to"):
            run(folder=tmp_path)
    for text in (b'{"model": 1', b'{"checks": []}', b"[]", b"\xff"):
        (tmp_path / "evaluation.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"evaluation\.json is garbled") as caught:
            load_evaluation(tmp_path)
        assert str(caught.value).endswith(ANEW)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PK")])
def test_of_damaged_outcomes_the_file_that_helps_is_named(run, tmp_path, damage):
    first = run(folder=tmp_path)
    damage(tmp_path / "outcomes.npz")
    with pytest.raises(ValueError, match=r"outcomes\.npz is (missing|garbled)") as caught:
        run(folder=tmp_path)
    assert str(caught.value).endswith(ANEW)
    (tmp_path / "evaluation.json").unlink()
    assert same(run(folder=tmp_path), first)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": 255 * torch.rand(50, 3, 6, 6)}, r"\[0, 1\], got .* to 25[0-9]"),
        ({"x": torch.rand(50, 3, 6, 6) - 0.5}, r"\[0, 1\]"),
        ({"x": torch.full((50, 3, 6, 6), float("nan"))}, r"\[0, 1\]"),
        ({"x": torch.ones(50, 3, 6, 6, dtype=torch.uint8)}, r"floats in \[0, 1\]"),
        ({"y": torch.full((50,), 5)}, "from 5 to 5 .* 5 outputs"),
        ({"y": torch.full((50,), -1)}, "from -1 to -1"),
        ({"y": torch.full((50,), 4), "num_classes": 4}, "4 classes and the model has 5 outputs"),
        ({"num_classes": 10}, "5 outputs for 10 classes"),
        ({"index": torch.tensor([], dtype=torch.long)}, "0 images"),
        ({"batch_size": 0}, "batches of 0"),
        ({"attacks": {"clean": FGSM(THREAT)}}, "'clean' is taken"),
        ({"attacks": {"a:b": FGSM(THREAT)}}, "colon"),
        ({"attacks": {"a": lambda m, x, y: x + 1}}, "attack a gave .* clamp"),
        ({"attacks": {"a": lambda m, x, y: x[:1]}}, "attack a gave"),
        ({"attacks": {"a": FGSM(Linf(0.1))}, "threat": THREAT}, r"moved an image by 0\.1"),
        ({"attacks": {"a": FGSM(L2(5.0))}, "threat": L2(0.5)}, "outside L2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_wrong_input_is_refused_in_one_line(run, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(**options)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_refused(run, model):
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite on 16 of 16 images"):
        run()


# --- checks ---


def test_an_honest_model_passes_every_check(run):
    result = run({**ATTACKS, "aa": AutoAttack(Linf(0.3))}, checks=True)
    assert set(result.checks) == {
        "eval mode",
        "deterministic output",
        "input gradient",
        "huge epsilon",
        "attack order",
    }
    assert all(check.passed for check in result.checks.values()), result.checks
    assert not any("failed" in line for line in result.lines())


class Masked(nn.Module):
    """Right, and without a gradient: it sees rounded images."""

    def __init__(self, model, levels):
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x):
        return self.model((x * self.levels).round() / self.levels)


def test_masked_gradients_fail_the_checks(run, model, images):
    net = Masked(model, 1)
    result = run(net=net, y=net(images).argmax(1), checks=True)
    assert not result.checks["input gradient"].passed
    assert "50 of 50 images (100.0 %)" in result.checks["input gradient"].detail
    assert not result.checks["huge epsilon"].passed
    assert sum("check failed" in line for line in result.lines()) == 2


class Awake(nn.Dropout):
    """Draws at random in eval mode too."""

    def train(self, mode=True):
        return super().train(True)


def test_random_output_and_training_modules_fail_the_checks(run, model):
    model[6] = Awake()
    checks = run(attacks={}, checks=True).checks
    assert not checks["deterministic output"].passed and not checks["eval mode"].passed
    assert checks["eval mode"].detail == "1 modules in training mode"


class Shifted(nn.Module):
    """Logits as the model's and gradients too, but for a share of the images."""

    def __init__(self, model, share):
        super().__init__()
        self.model, self.share = model, share

    def forward(self, x):
        wrong = torch.arange(len(x)).view(-1, 1, 1, 1) < self.share * len(x)
        return self.model(torch.where(wrong, 2 * x.detach() - x, x))


@pytest.mark.parametrize(("share", "passed"), [(0.0, True), (0.05, True), (0.2, False)])
def test_the_attacked_function_has_the_models_gradients(run, model, share, passed):
    result = run(twin=Shifted(model, share), checks=True)
    check = result.checks["attacked function"]
    assert check.passed is passed
    assert check.detail.endswith(f"agree on {round((1 - share) * 50 - 0.1)}")


def test_where_no_image_has_a_gradient_none_differs(run, model, images):
    flat = Masked(model, 1)
    result = run(net=flat, y=flat(images).argmax(1), twin=Masked(model, 1), checks=True)
    assert result.checks["attacked function"].passed


def test_small_gradients_are_compared_too(run, model):
    class Faint(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.model, self.sign = model, sign

        def forward(self, x):
            logits = self.model(x)
            return logits.detach() + self.sign * 1e-12 * (logits - logits.detach())

    for sign, passed in ((1, True), (-1, False)):
        result = run(net=Faint(1), twin=Faint(sign), attacks={}, checks=True)
        assert result.checks["attacked function"].passed is passed


def test_logits_that_differ_fail_the_check(run, model):
    class Louder(Shifted):
        def forward(self, x):
            return 2 * self.model(x)

    assert not run(twin=Louder(model, 0), checks=True).checks["attacked function"].passed


def test_a_weaker_attack_that_wins_fails_the_check():
    def order(**correct):
        outcomes = {name: np.arange(1000) < count for name, count in correct.items()}
        attacks = {
            "fgsm": FGSM(THREAT),
            "pgd": PGD(THREAT, 5),
            "cw": PGD(THREAT, 5, loss=Margin()),
            "aa": AutoAttack(THREAT),
            "far": PGD(Linf(0.5), 5),
            "own": lambda model, x, y: x,
        }
        return sanity.check_order({name: attacks[name] for name in correct}, outcomes)

    assert order(fgsm=500, pgd=400, cw=450, aa=300, far=900, own=0)["attack order"].passed
    one = order(fgsm=500, pgd=505)["attack order"]
    assert one.passed and one.detail == "1 pair in order"
    check = order(fgsm=500, pgd=506)["attack order"]
    assert not check.passed and check.detail == "pgd leaves 506 correct, fgsm 500"
    assert not order(aa=500, pgd=400)["attack order"].passed
    assert not order(aa=500, fgsm=400)["attack order"].passed
    assert order(pgd=500, cw=400) == {} and order(pgd=500, far=900) == {} and order(own=3) == {}


# --- subsets and pairs ---


def test_subsets():
    labels = torch.zeros(100)
    assert torch.equal(subset(labels, None, 1), torch.arange(100))
    assert torch.equal(subset(labels, 500, 1), torch.arange(100))
    state = torch.get_rng_state()
    drawn = subset(labels, 30, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, subset(labels, 30, 1)) and not torch.equal(
        drawn, subset(labels, 30, 2)
    )
    assert torch.equal(drawn, drawn.unique()) and len(drawn) == 30 and drawn.max() > 30
    with pytest.raises(ValueError, match="size = 0"):
        subset(labels, 0, 1)


def test_pairs_count_disagreements(run, make_network):
    first, second = run(), run(net=make_network().eval())
    for name in ("clean", "fgsm", WORST_CASE):
        result = paired(first, second, name)
        a, b = first.outcome(name), second.outcome(name)
        assert result.difference == pytest.approx(b.mean() - a.mean())
        assert result.lost == (a & ~b).sum() and result.won == (b & ~a).sum()
        assert result.interval[0] <= result.difference <= result.interval[1]
    assert paired(first, second, "clean").p_value < 0.01
    assert paired(first, first, "clean").p_value == 1
    with pytest.raises(ValueError, match="not evaluated on the same images"):
        paired(first, run(index=torch.arange(20)), "clean")
    with pytest.raises(ValueError, match="choose among clean, fgsm"):
        paired(first, second, "square")
