"""The public releases: SST-5 from the Stanford treebank, Quora and STS-B as GLUE has them.

TFDS downloads them, but its `extract` and hence `download_and_extract` need TensorFlow. So
archives are unpacked here, and TFDS's own GLUE builder, which does the reading, is handed a
download manager that does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import lzma
import os
import re
import stat
import struct
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from jaxlora.data.raw_examples import UNLABELLED, TextExample, parse_label
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

TREEBANK = "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
# GLUE's config, and the names of its two text features.
GLUE = {
    "para": ("qqp", "question1", "question2"),
    "sts": ("stsb", "sentence1", "sentence2"),
}
GLUE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
MOST_BYTES = 1_000_000_000  # unpacked; ten times the largest of them
# What reading a damaged archive may raise.
_UNREADABLE = (
    zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError,
    zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip
ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
}  # fmt: skip


def key(task: Task) -> str:
    """What names the content before it is downloaded.

    The releases never change under their address, and which GLUE archive is meant is decided
    by TFDS: so its version and the address stand for the bytes.
    """
    version = importlib.metadata.version("tensorflow-datasets")
    return f"tfds {version} {TREEBANK if task.name == 'sst' else 'glue/' + GLUE[task.name][0]}"


def read(task: Task, manager: tfds.download.DownloadManager) -> dict[str, list[TextExample]]:
    """Download and read a task's splits; GLUE's hidden test labels are NaN.

    Raises:
      UserError: the download fails or the archive is damaged.
    """
    return read_treebank(task, manager) if task.name == "sst" else read_glue(task, manager)


def read_treebank(
    task: Task, manager: tfds.download.DownloadManager
) -> dict[str, list[TextExample]]:
    """SST-5 from the parse trees: the label of the root, and the leaves as the sentence."""
    folder = fetch(manager, TREEBANK) / "trees"
    splits = {}
    for split in ("train", "dev", "test"):
        # Words may have other white space in them, such as 2 1/2's no-break space.
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").split("\n")
        splits[split] = [
            TextExample(f"{split}-{n}", sentence, "", parse_label(label, task, f"{split}.txt:{n}"))
            for n, (label, sentence) in enumerate(map(parse_tree, filter(None, lines)), 1)
        ]
    return splits


def parse_tree(tree: str) -> tuple[str, str]:
    r"""The root's label and the sentence of a tree in bracket notation.

    >>> parse_tree(r"(3 (2 (2 Writer\/director) (2 -LRB-)) (4 shines))")
    ('3', 'Writer/director ( shines')
    """
    leaves = re.findall(r"\(\d ([^() ]+)\)", tree)
    words = [ESCAPES.get(leaf, leaf.replace("\\", "")) for leaf in leaves]
    return tree[1:2], " ".join(words)


def read_glue(task: Task, manager: tfds.download.DownloadManager) -> dict[str, list[TextExample]]:
    """Quora or STS-B, read by TFDS's GLUE builder; quotes are part of the text, as it has them."""
    # `tfds.builder("glue/…")` imports every dataset of TFDS and fails without TensorFlow.
    from tensorflow_datasets.text.glue import Glue

    config, first, second = GLUE[task.name]
    glue = Glue(config=config, data_dir=manager.download_dir)
    splits = {}
    for generator in glue._split_generators(Unzipping(manager)):
        split = GLUE_SPLITS[generator.name]
        splits[split] = [
            TextExample(f"{split}-{n}", example[first].strip(), example[second].strip(), label)
            for n, example in glue._generate_examples(**generator.gen_kwargs)
            for label in [_glue_label(example["label"], task, f"glue/{config} {split}:{n}")]
        ]
    return splits


def _glue_label(value: float, task: Task, where: str) -> float:
    return UNLABELLED if value == -1 else parse_label(str(value), task, where)


@dataclasses.dataclass(frozen=True)
class Unzipping:
    """All that TFDS's GLUE builder asks of a download manager, without TensorFlow."""

    manager: tfds.download.DownloadManager

    def download_and_extract(self, url: str) -> str:
        """Download an archive and return the folder with its files."""
        return os.fspath(fetch(self.manager, url))


def fetch(manager: tfds.download.DownloadManager, url: str) -> Path:
    """Download a zip archive, unpack it beside itself, and return the folder.

    Raises:
      UserError: no network, no such file, or a damaged archive.
    """
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        _reach(url)
        archive = Path(manager.download(url))
    except (OSError, DownloadError) as error:
        raise UserError(
            f"--source official: cannot download {url} ({error}). Check the network, or use "
            "--data-dir with the CS224N files, or the source 'demo', which needs neither."
        ) from error
    return unzip(archive)


def _reach(url: str) -> None:
    """Fail at once without a network: TFDS would retry for minutes, a warning each time."""
    # An HTTP error means that somebody answered; TFDS will report what is wrong.
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=30).close()


def unzip(archive: Path) -> Path:
    """Unpack into `<archive>.files`, all or nothing, and nothing anywhere else.

    Raises:
      UserError: if the archive is damaged, too large, or names a place outside of the folder.
    """
    target = archive.with_name(archive.name + ".files")
    if target.is_dir():
        return target
    try:
        with files.building(target) as scratch, zipfile.ZipFile(archive) as bundle:
            _check_members(bundle.infolist())
            bundle.extractall(scratch)
    except _UNREADABLE as error:
        if target.is_dir():  # another process was quicker
            return target
        raise UserError(
            f"--source official: {archive} is damaged or cannot be unpacked ({error}); "
            "delete it and run again."
        ) from error
    return target


def _check_members(members: Iterable[zipfile.ZipInfo]) -> None:
    """Refuse what leads out of the folder, and more than a disk should be filled with.

    Raises:
      BadZipFile: naming the member.
    """
    size = 0
    for member in members:
        if not member.filename:
            raise zipfile.BadZipFile("a member has no name")
        path = PurePosixPath(member.filename.replace("\\", "/"))
        drive = PureWindowsPath(member.filename).drive
        if path.is_absolute() or drive or ".." in path.parts:
            raise zipfile.BadZipFile(f"{member.filename!r} leads out of its folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise zipfile.BadZipFile(f"{member.filename!r} is a link")
        size += member.file_size
    if size > MOST_BYTES:
        raise zipfile.BadZipFile(f"{size:,} bytes, at most {MOST_BYTES:,} are expected")
