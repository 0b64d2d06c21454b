# SPDX-License-Identifier: Apache-2.0
"""Official data set files, downloaded once and checked against their published MD5.

A file appears under its name, and an archive's folder under its own, only when complete and
checked.
"""

import fcntl
import os
import shutil
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.progress import DownloadColumn, Progress, TaskID

TORONTO = "https://www.cs.toronto.edu/~kriz/"
STANFORD_HOUSES = "http://ufldl.stanford.edu/housenumbers/"
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
CHUNK = 2**17
_ASIDE = ".unpacking-"


@dataclass(frozen=True)
class Remote:
    """One file: its MD5, the addresses that serve it, where it goes, what it unpacks to."""

    name: str
    md5: str
    mirrors: tuple[str, ...]
    subfolder: str = ""
    unpacks_to: str | None = None


def _idx_files(mirrors: tuple[str, ...], subfolder: str, sums: str) -> tuple[Remote, ...]:
    names = [
        f"{part}-{what}-ubyte.gz"
        for part in ("train", "t10k")
        for what in ("images-idx3", "labels-idx1")
    ]
    return tuple(
        Remote(name, md5, mirrors, subfolder) for name, md5 in zip(names, sums.split(), strict=True)
    )


REMOTES: dict[str, tuple[Remote, ...]] = {
    "cifar10": (
        Remote(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            (TORONTO,),
            unpacks_to="cifar-10-batches-bin",
        ),
    ),
    "cifar100": (
        Remote(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            (TORONTO,),
            unpacks_to="cifar-100-binary",
        ),
    ),
    "svhn": (
        Remote("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", (STANFORD_HOUSES,), "svhn"),
        Remote("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", (STANFORD_HOUSES,), "svhn"),
    ),
    "mnist": _idx_files(
        MNIST_MIRRORS,
        "MNIST/raw",
        """
        f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432
        9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c
        """,
    ),
    "fashion_mnist": _idx_files(
        FASHION_MIRRORS,
        "FashionMNIST/raw",
        """
        8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe
        bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310
        """,
    ),
    "tiny_imagenet": (
        Remote(
            "tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            ("http://cs231n.stanford.edu/",),
            unpacks_to="tiny-imagenet-200",
        ),
    ),
}


def download(name: str, folder: Path, *, progress: bool = True) -> None:
    """Put the official files of data set `name` under `folder`; what is there and intact is left
    alone.

    Raises:
        ValueError: a data set without downloads, or no address that serves the right bytes.
    """
    if name not in REMOTES:
        raise ValueError(f"{name!r} has no download; there are {', '.join(sorted(REMOTES))}")
    for remote in REMOTES[name]:
        target = folder / remote.subfolder
        if remote.unpacks_to is not None and (target / remote.unpacks_to).is_dir():
            continue
        archive = _fetch(remote, target, progress)
        if remote.unpacks_to is not None:
            _unpack(archive, target, remote.unpacks_to)


def _fetch(remote: Remote, folder: Path, progress: bool) -> Path:
    """The file, from the first mirror that has it; pooch moves it into place once checked."""
    import pooch
    from requests import RequestException

    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    failures = []
    for mirror in remote.mirrors:
        url, bar = mirror + remote.name, RichBar(remote.name)
        # Its hints know no bars but tqdm's, and `retrieve` those of no downloader but the user's.
        downloader = cast(Any, pooch.HTTPDownloader)(
            progressbar=bar if progress else False,
            chunk_size=CHUNK,
            # A server that unpacks .gz files on the way would change their MD5.
            headers={"Accept-Encoding": "identity"},
        )
        try:
            path = pooch.retrieve(
                url, f"md5:{remote.md5}", fname=remote.name, path=folder, downloader=downloader
            )
        except (RequestException, ValueError) as error:
            failures.append(f"{url} ({_reason(error)})")
        else:
            return Path(path)
        finally:
            bar.close()
    raise ValueError(
        f"could not download {'; '.join(failures)}; get {remote.name} by other means and put it "
        f"in {folder}"
    )


def _reason(error: Exception) -> str:
    """A short form of an error: pooch's and requests' own run over several lines."""
    if isinstance(error, ValueError) and "hash" in str(error):
        return "its MD5 is not the published one"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


class RichBar:
    """A progress bar with the four verbs that pooch asks of one."""

    def __init__(self, name: str):
        self.name = name
        self.total = 0
        self._shown: tuple[Progress, TaskID] | None = None

    def update(self, count: int) -> None:
        """Note `count` more bytes."""
        if self._shown is None:
            bar = Progress(*Progress.get_default_columns(), DownloadColumn(), transient=True)
            self._shown = bar, bar.add_task(self.name, total=self.total or None)
            bar.start()
        bar, task = self._shown
        bar.update(task, advance=count)

    def reset(self) -> None:
        """Back to zero."""
        if self._shown is not None:
            bar, task = self._shown
            bar.reset(task)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._shown is not None:
            self._shown[0].stop()


def _unpack(archive: Path, folder: Path, name: str) -> None:
    """Extract beside the target, then move the folder `name` into place in one step.

    One process at a time: others of the same run find it done.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if (folder / name).is_dir():
            return
        for left in folder.glob(f"{_ASIDE}*"):  # by a process that was killed
            shutil.rmtree(left)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
        try:
            _extract(archive, aside)
            if not (aside / name).is_dir():
                raise ValueError(f"{archive} holds no folder {name}; delete it and get it again")
            os.rename(aside / name, folder / name)
        finally:
            shutil.rmtree(aside)
    finally:
        os.close(held)


def _extract(archive: Path, folder: Path) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        return
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
