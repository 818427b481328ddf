"""The public releases: SST-5 from the Stanford treebank, Quora and STS-B from GLUE.

TFDS downloads them, but its `extract` and `download_and_extract` need TensorFlow. Archives are
therefore unpacked here, and TFDS's GLUE builder, which reads the files, is given a download manager
that unpacks in the same way.
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

from jaxlora.data.raw_examples import UNLABELLED, Label, TextExample, parse_label
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

TREEBANK = "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
# GLUE's config, and the names of its two text features.
GLUE = {
    "para": ("qqp", "question1", "question2"),
    "sts": ("stsb", "sentence1", "sentence2"),
}
GLUE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
MAX_BYTES = 1_000_000_000  # unpacked size limit, ten times that of the largest archive
# Errors that reading a damaged archive may raise.
_UNREADABLE = (
    zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError,
    zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip
ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
}  # fmt: skip


def key(task: Task) -> str:
    """Return a key of the content that is known before the download.

    The releases never change at their URL, and TFDS decides which GLUE archive is used. The TFDS
    version and the URL (or GLUE config) therefore identify the content.
    """
    version = importlib.metadata.version("tensorflow-datasets")
    return f"tfds {version} {TREEBANK if task.name == 'sst' else 'glue/' + GLUE[task.name][0]}"


def read(task: Task, manager: tfds.download.DownloadManager) -> dict[str, list[TextExample]]:
    """Download and read a task's splits; GLUE's hidden test labels are NaN.

    Raises:
      UserError: if the download fails or the archive is damaged.
    """
    return read_treebank(task, manager) if task.name == "sst" else read_glue(task, manager)


def read_treebank(
    task: Task, manager: tfds.download.DownloadManager
) -> dict[str, list[TextExample]]:
    """Read SST-5 from its parse trees: the root's label, and the leaves as the sentence."""
    folder = fetch(manager, TREEBANK) / "trees"
    splits = {}
    for split in ("train", "dev", "test"):
        # Not `splitlines`, since words may contain other separators, such as a no-break space.
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").split("\n")
        splits[split] = [
            TextExample(f"{split}-{n}", sentence, "", parse_label(label, task, f"{split}.txt:{n}"))
            for n, (label, sentence) in enumerate(map(parse_tree, filter(None, lines)), 1)
        ]
    return splits


def parse_tree(tree: str) -> tuple[str, str]:
    r"""Parse a tree in bracket notation into the label of its root and its sentence.

    >>> parse_tree(r"(3 (2 (2 Writer\/director) (2 -LRB-)) (4 shines))")
    ('3', 'Writer/director ( shines')
    """
    leaves = re.findall(r"\(\d ([^() ]+)\)", tree)
    words = [ESCAPES.get(leaf, leaf.replace("\\", "")) for leaf in leaves]
    return tree[1:2], " ".join(words)


def read_glue(task: Task, manager: tfds.download.DownloadManager) -> dict[str, list[TextExample]]:
    """Read Quora or STS-B with TFDS's GLUE builder, which keeps quotes in the text."""
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


def _glue_label(value: float, task: Task, where: str) -> Label:
    return UNLABELLED if value == -1 else parse_label(str(value), task, where)


@dataclasses.dataclass(frozen=True)
class Unzipping:
    """The part of a download manager that TFDS's GLUE builder uses, without TensorFlow."""

    manager: tfds.download.DownloadManager

    def download_and_extract(self, url: str) -> str:
        """Download and unpack an archive, and return the folder of its files."""
        return os.fspath(fetch(self.manager, url))


def fetch(manager: tfds.download.DownloadManager, url: str) -> Path:
    """Download a zip archive, unpack it into a folder beside it, and return the folder.

    Raises:
      UserError: if the network or the file is unavailable, or the archive is damaged.
    """
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        _check_reachable(url)
        archive = Path(manager.download(url))
    except (OSError, DownloadError) as error:
        raise ConfigError(
            "source",
            f"cannot download {url} ({error}). Check the network, or use `data_dir` with the "
            "CS224N files, or the source 'demo', which needs neither.",
            "official",
        ) from error
    return unzip(archive)


def _check_reachable(url: str) -> None:
    """Fail immediately without a network; TFDS would retry for minutes and warn each time."""
    # An HTTP error means that the server is reachable; TFDS reports it.
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=30).close()


def unzip(archive: Path) -> Path:
    """Unpack an archive into `<archive>.files` atomically.

    Raises:
      UserError: if the archive is damaged, too large, or has a member outside the folder.
    """
    target = archive.with_name(archive.name + ".files")
    if target.is_dir():
        return target
    try:
        with files.building(target) as scratch, zipfile.ZipFile(archive) as bundle:
            _check_members(bundle.infolist())
            bundle.extractall(scratch)
    except _UNREADABLE as error:
        if target.is_dir():  # another process finished first
            return target
        raise ConfigError(
            "source",
            f"{archive} is damaged or cannot be unpacked ({error}); delete it and run again.",
            "official",
        ) from error
    return target


def _check_members(members: Iterable[zipfile.ZipInfo]) -> None:
    """Check that no member is a link or outside the folder, and that the total size is allowed.

    Raises:
      BadZipFile: if a check fails; the message states the member or the size.
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
    if size > MAX_BYTES:
        raise zipfile.BadZipFile(f"{size:,} bytes, at most {MAX_BYTES:,} are expected")
