# SPDX-License-Identifier: Apache-2.0
"""The C library reads what Python reads and refuses, and gives the bits of Python's blocks."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import harprune
from harprune.deploy import artifact
from harprune.deploy.artifact import Values, save
from harprune.deploy.network import Network
from harprune.deploy.runtime import Engine
from harprune.kernels.lists import NEARLY_DENSE
from harprune.models import create_model
from tests.kernels.test_memory_safety import sanitizer

from .files import put_together, signed, taken_apart
from .networks import Branching, deployed, drawn, in_blocks, logits, normalised, pruned
from .test_fuzz import LARGEST_ARENA, altered

ROOT = Path(harprune.__file__).parents[1]
SOURCES = sorted((ROOT / "harprune" / "deploy" / "native").glob("*.c"))
LIBRARY = sorted((ROOT / "harprune" / "kernels").glob("_blocks*.so"))
COMPILER = shutil.which("cc") or shutil.which("gcc")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not LIBRARY, reason="needs a C compiler and the compiled kernels"
)


def build(folder: Path, name: str, *more: str | Path) -> Path:
    """A program or library of the C sources, on the kernels that Python runs."""
    out = folder / name
    command = [COMPILER, *WARNINGS, "-O1", *more, *SOURCES, LIBRARY[0], "-lm", "-o", out]
    subprocess.run([*command, f"-Wl,-rpath,{LIBRARY[0].parent}"], check=True)
    return out


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    path = build(tmp_path_factory.mktemp("native"), "libhpn.so", "-shared", "-fPIC")
    found = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.hpn_open.argtypes, found.hpn_open.restype = (ctypes.c_char_p, ctypes.c_char_p), pointer
    found.hpn_close.argtypes, found.hpn_close.restype = (pointer,), None
    found.hpn_run.argtypes, found.hpn_run.restype = (pointer, pointer, integer, pointer), None
    found.hpn_classes.argtypes, found.hpn_classes.restype = (pointer,), integer
    found.hpn_image.argtypes, found.hpn_image.restype = (pointer, pointer), None
    found.hpn_class_name.argtypes = (pointer, integer)
    found.hpn_class_name.restype = ctypes.c_char_p
    return found


class InC:
    """A file opened by the C library."""

    def __init__(self, library: ctypes.CDLL, path: Path):
        self._library = library
        error = ctypes.create_string_buffer(256)
        self._handle = library.hpn_open(str(path).encode(), error)
        if not self._handle:
            raise ValueError(error.value.decode())

    def __enter__(self) -> "InC":
        return self

    def __exit__(self, *error) -> None:
        self._library.hpn_close(self._handle)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        logits = np.empty((len(images), self._library.hpn_classes(self._handle)), np.float32)
        data = images.ctypes.data, len(images), logits.ctypes.data
        self._library.hpn_run(self._handle, *data)
        return logits

    @property
    def image(self) -> list[int]:
        shape = (ctypes.c_int64 * 3)()
        self._library.hpn_image(self._handle, shape)
        return list(shape)

    def names(self) -> list[str | None]:
        count = self._library.hpn_classes(self._handle)
        found = [self._library.hpn_class_name(self._handle, n) for n in range(count + 1)]
        return [None if name is None else name.decode() for name in found]


def same_bits(library: ctypes.CDLL, network: Network, path: Path, values=Values.FLOAT32) -> None:
    save(path, network, values=values)
    images = np.random.default_rng(0).random((19, *network.input_shape), np.float32)
    with InC(library, path) as engine:
        assert engine.image == list(network.input_shape)
        expected = logits(artifact.load(path), images)
        for count in (1, 19, 16):
            assert engine(images[:count]).tobytes() == expected[:count].tobytes()


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_give_the_same_bits(library, tmp_path, seed):
    network = drawn(seed, nodes=14)
    same_bits(library, network, tmp_path / "a.hpn", list(Values)[seed % 3])


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "preact_resnet18"])
def test_networks_of_the_field_give_the_same_bits(library, tmp_path, name):
    network = deployed(normalised(pruned(create_model(name, 10, width=16), 0.1)))
    same_bits(library, network, tmp_path / "a.hpn")


def test_dense_grouped_and_flattened_give_the_same_bits(library, tmp_path):
    for density in (1.0, 0.6, 0.3):
        same_bits(library, deployed(pruned(Branching(), density), side=20), tmp_path / "a.hpn")


def test_both_sides_agree_on_what_is_nearly_dense():
    source = (ROOT / "harprune" / "deploy" / "native" / "engine.c").read_text()
    assert f"#define NEARLY_DENSE {NEARLY_DENSE} " in source


def test_class_names_are_text(library, tmp_path):
    network = drawn(1)
    words = ("ö \U0001f600", 'a "quoted" \\ line\n', "")
    named = Network(network.graph, network.patterns, network.values, network.vectors, words)
    save(tmp_path / "a.hpn", named)
    with InC(library, tmp_path / "a.hpn") as engine:
        assert engine.names() == [*words, None]
    header, payload = taken_apart((tmp_path / "a.hpn").read_bytes())
    (tmp_path / "a.hpn").write_bytes(put_together(header, payload))  # escaped as \\uXXXX
    with InC(library, tmp_path / "a.hpn") as engine:
        assert engine.names() == [*words, None]
    save(tmp_path / "a.hpn", Network(*(getattr(network, n) for n in PARTS)))
    with InC(library, tmp_path / "a.hpn") as engine:
        assert engine.names() == [None] * 4


PARTS = ("graph", "patterns", "values", "vectors")


def agrees(library: ctypes.CDLL, content: bytes, path: Path) -> bool:
    """Whether both read a file; fails where only one of them does, or they compute otherwise."""
    path.write_bytes(content)
    try:
        engine = Engine(artifact.load(path))
        blocks = in_blocks(engine.network)
        if blocks.plan.arena_bytes > LARGEST_ARENA:
            return True
    except ValueError:
        engine = None
    try:
        with InC(library, path) as other:
            assert engine is not None, "C reads what Python refuses"
            images = np.random.default_rng(0).random((3, *engine.network.input_shape), np.float32)
            with np.errstate(all="ignore"):
                (wanted,), _ = blocks.forward([images])
                assert other(images).tobytes() == wanted.tobytes()
    except ValueError as error:
        assert engine is None, f"C refuses what Python reads: {error}"
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    return engine is not None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[bytes]:
    path, made = tmp_path_factory.mktemp("native") / "a.hpn", []
    for seed in range(12):
        save(path, drawn(seed, nodes=6), values=list(Values)[seed % 3])
        made.append(path.read_bytes())
    return made


def test_altered_files_are_read_or_refused_by_both(library, files, tmp_path):
    chance = random.Random(1)
    contents = [altered(files[n % len(files)], chance) for n in range(400)]
    read = sum(agrees(library, content, tmp_path / "a.hpn") for content in contents)
    assert 15 < read < 250


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"values":"float32","values":"float32"}',
        b'{"values":NaN}',
        b"\xff\xff",
        b"\xc0\x80",
        b"null",
        b"",
        b'{"values":"float32","input":[3,8,8],"nodes":[{"op":"pickle"}]}',
        b'{"values":"float32","input":[3,8,8],"nodes":[],"output":' + b"9" * 5000 + b"}",
        b'{"values":"flo',
        b'{"values":"\\u12"}',
        b'{"values":"float32",}',
        b"[01]",
        b"[1.]",
        b'"\\x"',
        b'"\n"',
        b"[1 2]",
        b"1e",
        b'"\\',
    ],
)
def test_headers_made_to_hurt_are_refused_by_both(library, tmp_path, text):
    text += b" " * (-(88 + len(text)) % 8)
    assert not agrees(library, signed(text, b""), tmp_path / "a.hpn")


@pytest.mark.parametrize(
    "metadata, read",
    [
        (b'{"a":9223372036854775807,"b":-9223372036854775807}', True),
        (b'{"a":9223372036854775808}', False),
        (b'{"a":-9223372036854775808}', False),
        (b'{"a":' + b"9" * 5000 + b"}", False),
        (b'{"a":9.999e307,"b":0.00001e312,"c":-1E-999,"d":0e999,"e":0.0e999}', True),
        (b'{"a":1e308}', False),
        (b'{"a":-0.001e311}', False),
        (b'{"a":1e' + b"9" * 5000 + b"}", False),
        (b'{"a":1e-' + b"9" * 5000 + b"}", True),
        (b'{"a":' + b"1" * 308 + b".5}", True),
        (b'{"a":' + b"1" * 309 + b".5}", False),
        (b'{"a":' + b"[" * 98 + b"]" * 98 + b"}", True),
        (b'{"a":' + b"[" * 99 + b"]" * 99 + b"}", False),
    ],
)
def test_both_have_the_same_limits(library, tmp_path, metadata, read):
    text = b'{"values":"float32","input":[3,8,8],"nodes":[{"op":"flatten","from":[0]}],"output":1,'
    text += b'"classes":[],"metadata":' + metadata + b"}"
    longer = text.replace(b"float32", b"float32\\u0000")
    for header, wanted in ((text, read), (longer, False)):
        header += b" " * (-(88 + len(header)) % 8)
        assert agrees(library, signed(header, b""), tmp_path / "a.hpn") == wanted


def test_what_is_no_file_is_refused(library, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="it cannot be read"):
            InC(library, path)


def test_the_example_classifies(tmp_path):
    program = build(tmp_path, "classify", ROOT / "examples" / "classify.c")
    network = drawn(3)
    save(tmp_path / "a.hpn", network)
    images = np.random.default_rng(0).random((70, *network.input_shape), np.float32)
    images.tofile(tmp_path / "images.raw")
    command = [program, tmp_path / "a.hpn", tmp_path / "images.raw"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = logits(network, images)
    for line, numbers in zip(said.splitlines(), expected, strict=True):
        *name, _, _, _ = line.split()
        assert " ".join(name) == network.classes[numbers.argmax()]
        assert np.array_equal(np.array(line.split()[-3:], np.float32), numbers)
    (tmp_path / "images.raw").write_bytes(images[:3].tobytes()[:-1])
    cut = subprocess.run(command, capture_output=True, text=True)
    assert cut.returncode == 2 and f"an image of {images[0].nbytes} bytes" in cut.stderr
    assert cut.stdout.splitlines() == said.splitlines()[:2]
    refused = subprocess.run([program, program, program], capture_output=True, text=True)
    assert refused.returncode == 2 and "does not start as a network does" in refused.stderr
    folder = subprocess.run([*command[:2], tmp_path], capture_output=True, text=True)
    assert folder.returncode == 2 and f"{tmp_path} cannot be read" in folder.stderr


@pytest.mark.slow
@pytest.mark.skipif(sanitizer() is None, reason="needs gcc with its address sanitizer")
def test_altered_files_reach_no_memory_but_their_own(files, tmp_path):
    """The example on a few thousand files, built to stop at any wrong access or overflow."""
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(tmp_path, "classify", ROOT / "examples" / "classify.c", *flags)
    chance, path = random.Random(2), tmp_path / "a.hpn"
    (tmp_path / "images.raw").write_bytes(bytes(4 * 5000))
    for number in range(3000):
        path.write_bytes(altered(files[number % len(files)], chance))
        try:
            network = artifact.load(path)
            if in_blocks(network).plan.arena_bytes > LARGEST_ARENA:
                continue
        except ValueError:
            pass
        command = [program, path, tmp_path / "images.raw"]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
        assert ran.returncode in (0, 2) and "runtime error" not in ran.stderr, ran.stderr[-3000:]
