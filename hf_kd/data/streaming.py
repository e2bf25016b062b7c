"""Images that are read from parquet or webdataset files, here or on the Hub, while training goes on.

The rows keep their numbers, and the order of an epoch is a function of seed and epoch, so that a stream is a map-style
dataset with an order that is cheap to read: every reader (each loader worker of each process) goes through row groups
of its own, a block of them at a time. A run is resumed by its step alone: the rows before it are not read again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.utils import logging

from ..hub import is_temporary, resolve
from .order import READ_AHEAD, RowGroup

logger = logging.get_logger(__name__)

TAR_GROUP = 64  # samples of a tar file that are read together
PATIENCE = 600  # seconds of failures after which a file is given up
READS = 4  # row groups that a reader reads at once


class StreamedRows:
    """The rows of parquet files by their numbers in the split, read a row group at a time.

    Args:
        files: paths or addresses of fsspec, in order.
        features: of the columns that are read.
        limit: only so many of the first rows.

    `groups` are its row groups, `origin` is what `load_data` knows of where they come from. A worker holds those of
    the current block in memory, as they are in the files, and those that it reads ahead: see `READ_AHEAD`.

    What cannot be reached is tried again for ten minutes, unless that is of no use.
    """

    origin: dict[str, str | None] | None = None
    _unlabelled: str | None = None

    def __init__(self, files: Sequence[str], features: datasets.Features, limit: int | None = None) -> None:
        self.features = features
        self._footers: dict[str, Any] = {}
        with ThreadPoolExecutor(16) as pool:
            self._rows = dict(zip(files, pool.map(self._index, files), strict=True))
        self.groups: list[RowGroup] = []
        for file, counts in self._rows.items():
            for index, rows in enumerate(counts):
                start = self.groups[-1].start + self.groups[-1].rows if self.groups else 0
                rows = rows if limit is None else min(rows, limit - start)
                if rows > 0:
                    self.groups.append(RowGroup(file, index, start, rows, self._size(file, index)))
        self._starts = np.array([group.start for group in self.groups])
        self._clear()

    def _index(self, file: str) -> list[int]:
        """The numbers of rows of a file's row groups."""
        self._footers[file] = _footer(file)
        return [self._footers[file].row_group(i).num_rows for i in range(self._footers[file].num_row_groups)]

    def _size(self, file: str, index: int) -> int:
        """The bytes of a row group in memory."""
        footer = self._footers[file].row_group(index)
        columns = [footer.column(i) for i in range(footer.num_columns)]
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in self.features)

    def _clear(self) -> None:
        self._tables: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._ahead: list[int] = []  # row groups that are to be read, in this order
        self._running = 0
        self._lock, self._pool = threading.RLock(), ThreadPoolExecutor(READS)
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None, "_lock": None, "_pool": None, "_pid": None}

    @property
    def total(self) -> int:
        """The number of rows without the limit."""
        return sum(map(sum, self._rows.values()))

    def without_labels(self, label_column: str) -> None:
        """The labels are all -1, for missing; the column, if there is one, is not read."""
        self._unlabelled = label_column
        self.features = datasets.Features({**self.features, label_column: datasets.Value("int64")})

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def __len__(self) -> int:
        return self.groups[-1].start + self.groups[-1].rows if self.groups else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int], following: Sequence[int] = ()) -> list[dict[str, Any]]:
        """These rows; the row groups with these numbers, from which further rows will be asked for, are read ahead."""
        rows = np.asarray(indices)
        rows = np.where(rows < 0, rows + len(self), rows)
        if ((rows < 0) | (rows >= len(self))).any():
            raise IndexError(f"there are {len(self)} rows, asked for are {list(indices)[:5]}")
        places = self._groups_of(rows)
        tables = self._start_reading(np.unique(places).tolist(), following)
        found: list[Any] = [None] * len(rows)
        for place, read in tables.items():
            here = np.flatnonzero(places == place)
            table = read.result().take(rows[here] - self.groups[place].start)
            for i, row in zip(here, table.to_pylist(), strict=True):
                found[i] = row if self._unlabelled is None else row | {self._unlabelled: -1}
        return found

    def _start_reading(self, places: list[int], following: Sequence[int]) -> dict[int, Future[pa.Table]]:
        """Starts to read row groups, those that are needed now first, and gives these. Forgets others where they are
        too many, those first that were used the longest ago."""
        if self._pid != os.getpid():  # threads do not live on in a forked worker
            self._clear()
        with self._lock:
            for place in places:
                table = self._tables.get(place)
                if table is None or (table.done() and table.exception()):
                    self._submit(place)
            wanted = dict.fromkeys([*places, *following])
            self._ahead = list(following)
            self._read_ahead()
            for place in filter(self._tables.__contains__, wanted):
                self._tables.move_to_end(place)
            held = sum(self.groups[place].size for place in {*self._tables, *wanted})
            while held > READ_AHEAD and next(iter(self._tables)) not in wanted:
                oldest, _ = self._tables.popitem(last=False)
                held -= self.groups[oldest].size
            return {place: self._tables[place] for place in places}

    def _submit(self, place: int) -> None:
        def read() -> pa.Table:
            try:
                return self._read(self.groups[place])
            except BaseException:
                self._ahead = []  # until more is asked for
                raise
            finally:
                with self._lock, contextlib.suppress(RuntimeError):  # Python is about to exit
                    self._running -= 1
                    self._read_ahead()

        self._running += 1
        self._tables[place] = self._pool.submit(read)

    def _read_ahead(self) -> None:
        """Keeps all threads busy. More are not submitted: Python waits for what is when it exits."""
        for place in self._ahead:
            if self._running >= READS:
                break
            if place not in self._tables:
                self._submit(place)

    def label_range(self, column: str) -> tuple[int, int]:
        """The smallest and the largest label of a column of integers, a missing one counting as -1."""
        if not getattr(self.features[column], "dtype", "").startswith(("int", "uint")):
            raise ValueError(f"column {column!r} is {self.features[column]}: a stream needs integers as labels")
        low, high = 0, 0
        for group in self.groups:
            footer = self._footers[group.file].row_group(group.index)
            chunk = next(c for c in map(footer.column, range(footer.num_columns)) if c.path_in_schema == column)
            statistics = chunk.statistics
            if statistics is not None and statistics.has_min_max and statistics.has_null_count:
                least, most, missing = statistics.min, statistics.max, statistics.null_count
            else:
                values = self._read(group, [column])[column]
                least, most, missing = pc.min(values).as_py(), pc.max(values).as_py(), values.null_count
            low = min(low, -1 if missing else least)
            high = max(high, -1 if most is None else most)
        return low, high

    def schemas(self) -> dict[str, pa.Schema]:
        """The schema of each file, with the names of classes where it has them."""
        return {file: footer.schema.to_arrow_schema() for file, footer in self._footers.items()}

    def describe(self) -> list[str]:
        """Names, sizes and row counts of the files."""
        return [f"{os.path.basename(file)} {_file_size(file)} {sum(counts)}" for file, counts in self._rows.items()]

    def place(self, row: int) -> str:
        """The name of the file and the number in it of a row."""
        group = self.groups[int(self._groups_of(np.asarray(row)))]
        start = next(first.start for first in self.groups if first.file == group.file)
        return f"{os.path.basename(group.file)}, row {row - start}"

    def _groups_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        def read(file: Any) -> pa.Table:
            parquet = pq.ParquetFile(file, metadata=self._footers[group.file], pre_buffer=True)
            names = [name for name in self.column_names if name != self._unlabelled]
            return parquet.read_row_group(group.index, columns=columns or names)

        return _patiently(group.file, read)


class TarRows(StreamedRows):
    """The samples of a webdataset: an image (jpg, jpeg, png or webp) and a label (cls, or the "label" of a json).

    Its files have no index: their headers are read once for it, which on the Hub takes as long as reading all of them.
    The index is kept in the cache of datasets.
    """

    def _index(self, file: str) -> list[int]:
        def read(opened: Any) -> list[tuple[int, int]]:
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                return [(sample["end"], sample["label"]) for sample in _samples(tar, file, with_images=False)]

        filesystem, path = fsspec.core.url_to_fs(file)
        kept = Path(datasets.config.HF_DATASETS_CACHE, "hf_kd_tar_index", f"{filesystem.ukey(path)}.json")
        try:
            ends_and_labels = json.loads(kept.read_text())
        except (OSError, ValueError):
            if "://" in file:
                logger.warning_once(
                    "the tar files have no index: it is made now, once, which takes as long as reading all of them, "
                    f"and kept in {kept.parent}"
                )
            ends_and_labels = _patiently(file, read)
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                temporary = kept.with_suffix(f".{os.getpid()}.tmp")  # several processes may make it at once
                temporary.write_text(json.dumps(ends_and_labels))
                temporary.replace(kept)
        groups = [ends_and_labels[i : i + TAR_GROUP] for i in range(0, len(ends_and_labels), TAR_GROUP)]
        stops = [group[-1][0] for group in groups]
        labels = [label for _, label in ends_and_labels]
        self._footers[file] = [*zip([0, *stops], stops, strict=False)], min(labels, default=0), max(labels, default=0)
        return [len(group) for group in groups]

    def _size(self, file: str, index: int) -> int:
        start, stop = self._footers[file][0][index]
        return stop - start

    def label_range(self, column: str) -> tuple[int, int]:
        footers = self._footers.values()
        return min(low for _, low, _ in footers), max(high for _, _, high in footers)

    def schemas(self) -> dict[str, pa.Schema]:
        return {}

    def _read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        start, stop = self._footers[group.file][0][group.index]

        def read(file: Any) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        with tarfile.open(fileobj=io.BytesIO(_patiently(group.file, read)), mode="r:") as tar:
            rows = [{"image": sample["image"], "label": sample["label"]} for sample in _samples(tar, group.file)]
        return pa.Table.from_pylist(rows)


def _samples(tar: tarfile.TarFile, file: str, with_images: bool = True) -> Iterator[dict[str, Any]]:
    """The samples of a tar file: members that follow each other and have the same name up to its first dot."""

    def key(member: tarfile.TarInfo) -> str:
        folder, _, name = member.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"

    for name, members in itertools.groupby((member for member in tar if member.isfile()), key):
        found: dict[str, list[Any]] = {"image": [], "cls": [], "json": []}
        unlabelled = True
        for member in members:
            kind = member.name.rpartition("/")[2].partition(".")[2].lower()
            content: Any = tar.extractfile(member)
            if kind in ("jpg", "jpeg", "png", "webp"):
                data = content.read() if with_images else None
                found["image"].append({"bytes": data, "path": f"{os.path.basename(file)}:{member.name}"})
            elif kind in found:
                unlabelled = False
                with contextlib.suppress(ValueError):  # no number, or no JSON
                    found[kind].append(json.loads(content.read()))
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        labels = found["cls"] or [each.get("label") for each in found["json"] if isinstance(each, dict)]
        labels = labels or ([-1] if unlabelled else [])
        if len(found["image"]) != 1 or len(labels) != 1 or type(labels[0]) is not int:
            raise ValueError(
                f"{file}: {name} does not have exactly one image (jpg, png, webp), or no number as label (cls, or "
                '"label" in json)'
            )
        yield {"image": found["image"][0], "label": labels[0], "end": end}


def _file_size(file: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(file)
    return filesystem.size(path)


def check_class_names(schemas: Mapping[str, pa.Schema]) -> None:
    """ValueError where the files name the classes of a column differently: only the names of the first are known."""
    first: dict[str, tuple[str, list[str]]] = {}
    for file, schema in schemas.items():
        for column, feature in datasets.Features.from_arrow_schema(schema).items():
            names = getattr(feature, "names", None) or []  # of a ClassLabel
            other, others = first.setdefault(column, (file, names)) if names else (file, names)
            if others != names:
                differ = next((i, a, b) for i, (a, b) in enumerate(itertools.zip_longest(others, names)) if a != b)
                raise ValueError(
                    f"{other} and {file} name the classes of column {column!r} differently, label {differ[0]} is "
                    f"{differ[1]!r} and {differ[2]!r}: write all files with the same ClassLabel"
                )


def stream_features(file: str) -> datasets.Features:
    """The features that a parquet file says its columns have."""
    return datasets.Features.from_arrow_schema(_footer(file).schema.to_arrow_schema())


def _footer(file: str) -> pq.FileMetaData:
    return _patiently(file, lambda opened: pq.ParquetFile(opened).metadata)


def _patiently(file: str, read: Callable[[Any], Any]) -> Any:
    """What `read` gives of the opened file; after an error of the network again, for `PATIENCE` seconds."""
    wait, given_up = 1.0, time.monotonic() + PATIENCE
    while True:
        try:
            with fsspec.open(file, "rb") as opened:
                return read(opened)
        except Exception as error:
            if not is_temporary(error) or time.monotonic() + wait > given_up:
                raise
            logger.warning(f"{file} could not be read ({error}): trying again in {wait:.0f} s")
        time.sleep(wait)
        wait = min(2 * wait, 60)


def stream_splits(
    name: str, path: Path | None, config_name: str | None, revision: str | None
) -> tuple[type[StreamedRows], dict[str, list[str]], datasets.Features | None, str | None]:
    """How the rows of a dataset are read, the files of each split, the features if known without a file, the commit.

    `path` is where it is on this machine, or None. Raises ValueError for a dataset of other files.
    """
    commit = None
    if path is not None and path.is_file():
        return StreamedRows, {"train": [str(path)]}, None, None
    if path is None:
        revision = resolve(name, revision, "dataset")
        commit = revision.resolved
    builder = datasets.load_dataset_builder(str(path or name), config_name, revision=revision)
    files: Any = builder.config.data_files or {}
    kind = builder.info.builder_name
    if kind not in ("parquet", "webdataset"):
        raise ValueError(
            f"{name} is made of {kind} files, of which a stream would be in the order of their classes or has no "
            "numbers of rows: leave --streaming out, or write it as parquet with "
            "load_dataset(...).to_parquet(...)"
        )
    paths = {str(split): [str(file) for file in names] for split, names in files.items()}
    if kind == "webdataset":
        return TarRows, paths, datasets.Features(image=datasets.Image(), label=datasets.Value("int64")), commit
    return StreamedRows, paths, builder.info.features, commit
