# SPDX-License-Identifier: Apache-2.0
"""Downloads against a server on this machine: complete and checked, or not there at all."""

import hashlib
import io
import struct
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harprune.training import download as downloads
from harprune.training.data import load_dataset
from harprune.training.download import REMOTES, Remote, download


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """(folder that is served, its address, paths asked for)."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(Quiet):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{http.server_port}/", asked
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def tarball(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def offer(monkeypatch, *remotes):
    monkeypatch.setitem(REMOTES, "mnist", remotes)


def idx_files():
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 2051, 2, 1, 1) + b"\x01\x02"
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 2049, 2) + b"\x00\x01"
    return files


@pytest.mark.parametrize("progress", [False, True])
def test_missing_files_are_downloaded_once(server, monkeypatch, tmp_path, progress):
    served, address, asked = server
    remotes = []
    for name, content in idx_files().items():
        (served / name).write_bytes(content)
        remotes.append(Remote(name, md5(content), (address,), "MNIST/raw"))
    offer(monkeypatch, *remotes)
    folder = tmp_path / "data"
    for _ in range(2):
        dataset = load_dataset("mnist", folder, download=True, progress=progress)
        assert dataset.train.images.flatten().tolist() == [1, 2]
    assert len(asked) == 4
    assert sorted(p.name for p in (folder / "MNIST" / "raw").iterdir()) == sorted(idx_files())


def test_wrong_bytes_leave_nothing_behind(server, monkeypatch, tmp_path):
    served, address, _ = server
    (served / "a.bin").write_bytes(b"garbled")
    offer(monkeypatch, Remote("a.bin", md5(b"right"), (address,)))
    with pytest.raises(ValueError, match=r"a.bin \(its MD5 is not the published one\)") as caught:
        download("mnist", tmp_path / "data", progress=False)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "data") in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_next_mirror_is_tried(server, monkeypatch, tmp_path):
    served, address, asked = server
    (served / "a.bin").write_bytes(b"right")
    offer(monkeypatch, Remote("a.bin", md5(b"right"), (address + "gone/", address)))
    download("mnist", tmp_path, progress=False)
    assert asked == ["/gone/a.bin", "/a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"right"


def test_no_server_is_one_line(monkeypatch, tmp_path):
    offer(monkeypatch, Remote("a.bin", md5(b""), ("http://127.0.0.1:9/",)))
    with pytest.raises(
        ValueError, match=r"could not download http://127\.0\.0\.1:9/a\.bin"
    ) as caught:
        download("mnist", tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_a_file_put_there_by_hand_is_used(monkeypatch, tmp_path):
    content = tarball({"inner/file": b"1"})
    (tmp_path / "a.tar.gz").write_bytes(content)
    remote = Remote("a.tar.gz", md5(content), ("http://127.0.0.1:9/",), unpacks_to="inner")
    offer(monkeypatch, remote)
    download("mnist", tmp_path, progress=False)
    assert (tmp_path / "inner" / "file").read_bytes() == b"1"


def test_archives_are_unpacked_once_and_as_a_whole(server, monkeypatch, tmp_path):
    served, address, asked = server
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inner/train/file", b"1")
    contents = {"a.tar.gz": tarball({"inner/train/file": b"1"}), "a.zip": buffer.getvalue()}
    for name, content in contents.items():
        (served / name).write_bytes(content)
        offer(monkeypatch, Remote(name, md5(content), (address,), unpacks_to="inner"))
        for _ in range(2):
            download("mnist", tmp_path / name, progress=False)
        assert (tmp_path / name / "inner" / "train" / "file").read_bytes() == b"1"
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == sorted([name, "inner"])
    assert asked == ["/a.tar.gz", "/a.zip"]


def test_an_interrupted_unpacking_does_not_count(monkeypatch, tmp_path):
    content = tarball({"inner/file": b"1"})
    (tmp_path / "a.tar.gz").write_bytes(content)
    offer(monkeypatch, Remote("a.tar.gz", md5(content), (), unpacks_to="inner"))

    def interrupted(archive, folder):
        (folder / "inner").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_fetch", lambda *_: tmp_path / "a.tar.gz")
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download("mnist", tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]
    download("mnist", tmp_path, progress=False)
    assert (tmp_path / "inner" / "file").read_bytes() == b"1"


def test_what_a_killed_process_unpacked_is_removed(monkeypatch, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tarball({"inner/file": b"1"}))
    (tmp_path / ".unpacking-abcdefgh" / "inner").mkdir(parents=True)
    offer(monkeypatch, Remote("a.tar.gz", "", (), unpacks_to="inner"))
    monkeypatch.setattr(downloads, "_fetch", lambda *_: tmp_path / "a.tar.gz")
    download("mnist", tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "inner"]


def test_processes_that_unpack_at_once_do_not_meet(monkeypatch, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tarball({"inner/file": b"1"}))
    extract, extracted = downloads._extract, []

    def slowly(archive, folder):
        extracted.append(folder)
        time.sleep(0.2)
        extract(archive, folder)

    monkeypatch.setattr(downloads, "_extract", slowly)
    call = (tmp_path / "a.tar.gz", tmp_path, "inner")
    threads = [threading.Thread(target=downloads._unpack, args=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(extracted) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "inner"]


def test_a_member_outside_the_folder_is_refused(monkeypatch, tmp_path):
    content = tarball({"../escaped": b"1"})
    (tmp_path / "a.tar.gz").write_bytes(content)
    offer(monkeypatch, Remote("a.tar.gz", md5(content), ("http://127.0.0.1:9/",), unpacks_to="x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        download("mnist", tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_what_cannot_be_downloaded(tmp_path):
    with pytest.raises(ValueError, match="'digits' has no download; there are cifar10, cifar100"):
        download("digits", tmp_path)


def test_the_published_checksums_are_md5_sums():
    sums = [remote.md5 for remotes in REMOTES.values() for remote in remotes]
    assert len(set(sums)) == len(sums) == 13
    assert all(len(s) == 32 and int(s, 16) for s in sums)
