# SPDX-License-Identifier: Apache-2.0
"""One run's folder: where each stage's network lies, which stages are done, and who works in it.

    recipe.toml        the recipe that was run        recipe.json   with every default
    environment.json   versions, machine, command     log.txt       what was said
    inputs.json        digests of the images and, where one was given, of the dense network
    <stage>.progress   where an unfinished stage goes on, and <stage>.best its best epoch so far;
                       both are removed when it is done
    dense.safetensors  pruned.safetensors  finetuned.safetensors
    attack/            one folder for each network that was attacked

These are sources: nothing else knows what they say. What derives from them can be made anew:

    metrics.jsonl      one line per epoch             warnings.json what stages warned of, if at all
    audit.json         what is kept                   report/
    validation.json    accuracies of the network that each stage left, on validation images
    scoring.json       what a method spent on images that it scored weights with, if it did

A stage is finished when its network exists; that is all the state a run has. It has begun when it
or a later one has left a file.
"""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harprune.files import make_folder, write
from harprune.nested import Difference, differences, in_words
from harprune.recipe.schema import Recipe
from harprune.recipe.text import as_toml, completed, make_recipe
from harprune.reporting.records import STAGES
from harprune.run.derived import read_record, require_known, write_derived, write_metrics
from harprune.run.environment import environment_of
from harprune.run.lock import lock
from harprune.training import checkpoint

# .NAME.xxxxxxxx of the files that a run writes, as `tempfile` draws it, or .tmpXXXXXX, as
# safetensors does; and where they lie.
_TEMPORARY = re.compile(
    r"\.tmp[A-Za-z0-9]{6}"
    r"|\.\w+\.(toml|jsonl?|progress|best|safetensors|npz|md|html|svg)\.[a-z0-9_]{8}"
)
_PLACES = (".*", "attack/*/.*", "report/.*", "report/plots/.*")
# What of an environment a number may depend on, and what was asked for.
_DECISIVE = ("commit", "python", "versions", "machine", "command")
_OF_EVALUATE = {
    "attack.attacks": "--attack",
    "attack.size": "--size",
    "attack.seed": "--seed",
    "attack.batch_size": "--batch-size",
}
"""Keys that `harprune evaluate` has an option for."""
_WAYS_BACK = {
    "dense network": ", or give the same weights: of a network that is made anew they are others, "
    "unless torch.manual_seed comes before it or they are loaded"
}
_READ_FIRST_BY = {"budget": "prune", "method": "prune"}
"""The stage that is the first to read a section which has not its name."""
WITHOUT_EFFECT = ("execution.checkpoint_minutes",)
"""Keys on which no result depends: they may change at any time."""
_MADE_FROM = {"prune": "pretrain", "finetune": "prune"}
"""The stage whose network another one goes on from."""

Network = tuple[dict[str, Tensor], dict[str, Any]]
"""A network's file: its tensors, and what else is known of it."""


class RunFolder:
    """An open run folder; `close` (or leaving its `with` block) releases it.

    Args:
        folder: created when absent.
        recipe: what the run is about; a folder in which another one has begun is refused.
        source: the recipe as the user wrote it, kept beside the resolved one.
        command: how to repeat the run, for the record.

    Raises:
        ValueError: the folder belongs to another recipe, or another process works in it.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, *, source: str = "", command: str = ""):
        self.path = Path(folder)
        self.recipe = recipe
        self.leader = int(os.environ.get("RANK", "0")) == 0
        self._warned: dict[str, list[str]] = {}
        self._going_on: dict[str, Any] = {}
        self._changed: tuple[str, dict] | None = None
        if not self.leader:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, not a run folder; choose another --out")
        make_folder(self.path)
        self._lock = lock(self.path)
        try:
            self._adopt(source, command)
            self._tidy()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        if self.leader:
            self._lock.close()

    def _adopt(self, source: str, command: str) -> None:
        resolved = self.recipe.model_dump(mode="json")
        record = self.path / "recipe.json"
        if begun_in(self.path):
            if not record.exists():
                raise ValueError(f"{record} is missing; restore it or choose another --out")
            found = list(differences(completed(read_record(record)), resolved))
            begun = [difference for difference in found if self._has_begun(difference)]
            if begun:
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({in_words(begun)}); "
                    f"choose another --out{self._attacked_otherwise(begun)}"
                )
            self._require_whole()
            self._going_on = environment_of(command, self.recipe.execution)
            self._changed = (source, resolved) if found else None
            return
        self._write_recipe(source, resolved)
        environment = json.dumps(environment_of(command, self.recipe.execution), indent=1)
        write(self.path / "environment.json", environment + "\n")

    def _write_recipe(self, source: str, resolved: dict) -> None:
        given = self.recipe.model_dump(mode="json", exclude_unset=True)
        # As it was written where it says all; not where the command said more.
        if not source or make_recipe(tomllib.loads(source)) != self.recipe:
            source = "\n".join(as_toml(given)) + "\n"
        write(self.path / "recipe.toml", source)
        write(self.path / "recipe.json", json.dumps(resolved, indent=1) + "\n")

    def _has_begun(self, difference: Difference) -> bool:
        """Whether a key decided what was computed; those of stages yet to come may still change."""
        key, *values = difference
        # Where something lies that the run knows by its digest.
        if key == "data.folder":
            return "set of training images" not in self._inputs()
        if key == "model.weights" and all(values):
            return "dense network" not in self._inputs()
        # Of attacks on the dense network what is there stays, what is not may yet come.
        if key in (*WITHOUT_EFFECT, "attack.dense"):
            return False
        if key == "attack.dense_size":
            return self.recipe.attack.dense and self.attack("dense").exists()
        section = key.partition(".")[0]
        if section == "attack":
            return (self.path / "attack").exists()
        stage = _READ_FIRST_BY.get(section, section)
        return stage not in STAGES or begun_in(self.path, since=stage)

    def _require_whole(self) -> None:
        """Find now, not after hours, what is damaged and cannot be made anew."""
        if (environment := self.path / "environment.json").exists():
            read_record(environment)
        networks = self._networks()
        require_known(self.path, _values(networks))
        self._require_descent(networks)

    def _attacked_otherwise(self, found: Iterable[Difference]) -> str:
        """How else to attack the network of a finished run, where nothing but that is wanted."""
        said = []
        for key, _, new in found:
            if key not in _OF_EVALUATE or new in (None, []):
                return ""
            values = new if isinstance(new, list) else [new]
            said += [f"{_OF_EVALUATE[key]} {value}" for value in values]
        folder = shlex.quote(str(self.path))
        command = f"harprune evaluate {folder} {' '.join(said)} --out FOLDER"
        return f", or attack its network by `{command}`"

    def require_same(self, inputs: Mapping[str, str]) -> None:
        """Keep what the run is made from, by digests; refuse to go on from anything else.

        Raises:
            ValueError: the run began with other images, or another dense network.
        """
        if not self.leader:
            return
        held = self._inputs()
        for name, digest in inputs.items():
            if held.get(name, digest) != digest:
                raise ValueError(
                    f"{self.path} holds a run that began with another {name}; choose another "
                    f"--out{_WAYS_BACK.get(name, '')}"
                )
        if held != dict(inputs):
            write(self.path / "inputs.json", json.dumps(dict(inputs), indent=1) + "\n")

    def _inputs(self) -> dict[str, str]:
        """The digests of what the run began with; none where nothing was computed, or told."""
        path = self.path / "inputs.json"
        return read_record(path) if path.exists() and begun_in(self.path) else {}

    @property
    def corrected(self) -> bool:
        """Whether it goes on with another recipe, in keys that no result depended on before."""
        return self._changed is not None

    def note_change(self) -> None:
        """Keep what the run goes on with: other keys, and other code, machine or command.

        For whoever is about to write what was computed: a command that fails before leaves no
        trace.
        """
        if not self._going_on:
            return
        if self._changed is not None:
            self._write_recipe(*self._changed)
        path = self.path / "environment.json"
        held = read_record(path) if path.exists() else {}
        last = [held, *held.get("continued", [])][-1]
        if any(last.get(key) != self._going_on[key] for key in _DECISIVE):
            continued = [*held.get("continued", []), self._going_on]
            write(path, json.dumps({**held, "continued": continued}, indent=1) + "\n")
        self._going_on = {}

    def _tidy(self) -> None:
        """Remove what killed processes left: half-written files, progress of finished stages."""
        for place in _PLACES:
            remove_litter(self.path, place)
        for stage in STAGES:
            if self.network(stage).exists():
                self._forget(stage)

    def _forget(self, stage: str) -> None:
        self.progress(stage).unlink(missing_ok=True)
        self.best(stage).unlink(missing_ok=True)

    def network(self, stage: str) -> Path:
        """The file of the network that a finished training stage leaves."""
        return self.path / f"{STAGES[stage]}.safetensors"

    def progress(self, stage: str) -> Path:
        """Where an unfinished training stage goes on."""
        return self.path / f"{stage}.progress"

    def best(self, stage: str) -> Path:
        """The best epoch so far of an unfinished training stage."""
        return self.path / f"{stage}.best"

    def attack(self, model: str) -> Path:
        """The folder of one model's evaluation."""
        return self.path / "attack" / model

    def warn(self, stage: str, text: str) -> None:
        """Keep what a reader of the report must know; written when the stage finishes."""
        self._warned.setdefault(stage, []).append(text)

    def finish(self, stage: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write a stage's network, with what it warned of, and drop what was kept to resume it.

        Raises:
            ValueError: a later stage went on from another network of this one; none is written.
        """
        if not self.leader:
            return
        self.note_change()
        networks = self._networks()
        values = {**values, "warnings": self._warned.get(stage, [])}
        values |= self.origin(stage)
        networks[stage] = dict(tensors), values
        self._require_descent(networks)
        write_derived(self.path, _values(networks))
        checkpoint.save(self.network(stage), tensors, values)
        self._forget(stage)

    def histories(self) -> dict[str, list[dict]]:
        """The epochs of each finished stage."""
        return {stage: values["history"] for stage, (_, values) in self._networks().items()}

    def write_metrics(self, histories: Mapping[str, list[dict]]) -> None:
        """One line per finished epoch of each stage, in order."""
        if self.leader:
            write_metrics(self.path, histories)

    def restore_derived(self) -> None:
        """Make what derives from the networks anew where it is missing or not as they say."""
        write_derived(self.path, _values(self._networks()))

    def _networks(self) -> dict[str, Network]:
        """What each finished stage left."""
        finished = [stage for stage in STAGES if self.network(stage).exists()]
        return {stage: checkpoint.load(self.network(stage)) for stage in finished}

    def origin(self, stage: str) -> dict[str, str]:
        """How a file of `stage` says which network that stage went on from."""
        if stage not in _MADE_FROM:
            return {}
        tensors, _ = checkpoint.load(self.network(_MADE_FROM[stage]))
        return {"origin": checkpoint.digest(tensors)}

    def _require_descent(self, networks: Mapping[str, Network]) -> None:
        """Raises ValueError where a stage went on from another network than is there now."""
        for later, earlier in _MADE_FROM.items():
            if earlier not in networks:
                continue
            path, values = self.progress(later), {}
            if later in networks:
                path, values = self.network(later), networks[later][1]
            elif path.exists():
                _, values = checkpoint.load(path)
            digest = checkpoint.digest(networks[earlier][0])
            # A file of an earlier version does not say what it was made from.
            if values.get("origin", digest) != digest:
                raise ValueError(
                    f"{path} was made from another network than {self.network(earlier).name} is "
                    f"now; restore that one, or delete {path.name} and what was made from it"
                )


def _values(networks: Mapping[str, Network]) -> dict[str, dict[str, Any]]:
    return {stage: values for stage, (_, values) in networks.items()}


def begun_in(folder: str | Path, since: str = "pretrain") -> bool:
    """Whether anything of the stage `since`, or of a later one, was computed in a folder.

    Where nothing was, its recipe failed before and may be corrected.
    """
    stages = list(STAGES)
    names = [
        name
        for stage in stages[stages.index(since) :]
        for name in (
            f"{STAGES[stage]}.safetensors",
            f"{stage}.progress",
            f"{stage}.best",
            f"attack/{STAGES[stage]}/evaluation.json",
        )
    ]
    return any((Path(folder) / name).exists() for name in names)


def remove_litter(folder: Path, place: str = ".*") -> None:
    """Remove half-written files of killed processes; `folder` is this process's alone."""
    for path in list(folder.glob(place)):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()
