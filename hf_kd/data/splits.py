"""Which images are held out or chosen, by hashes of their encoded bytes, and the fingerprints of splits."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .decode import UndecodableImage, read_file


def image_hashes(data: datasets.Dataset, image_column: str) -> np.ndarray:
    """A hash of each row's encoded image, uint64 (n,), equal for equal bytes; those of local files are cached."""
    column = data.with_format(None).select_columns(image_column)
    column = column.cast_column(image_column, datasets.Image(decode=False)).with_format("arrow")
    hashes, paths = np.zeros(len(data), dtype=np.uint64), {}
    for start in range(0, len(data), 1000):
        for row, source in enumerate(column[start : start + 1000][image_column].to_pylist(), start):
            source = source or {}
            if source.get("bytes") is None and source.get("path") is not None:
                paths[row] = os.path.abspath(source["path"]) if "://" not in source["path"] else source["path"]
            else:
                hashes[row] = _hash(source.get("bytes") or b"")
    if paths:
        hashes[list(paths)] = _file_hashes(list(paths.values()))
    return hashes


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _hash_file(path: str) -> int:
    try:
        return _hash(read_file(path))
    except UndecodableImage:  # a file that cannot be read; training and evaluation will skip it
        return _hash(os.path.basename(path).encode())


def _file_hashes(paths: list[str]) -> list[int]:
    """The hashes of files, through a cache in datasets' cache folder by path, size and time."""
    stats = {path: os.stat(path) for path in paths if os.path.exists(path)}
    keys = [f"{stats[path].st_size} {stats[path].st_mtime_ns} {path}" if path in stats else path for path in paths]
    name = f"{_hash(os.path.dirname(os.path.commonprefix(paths)).encode()):016x}.parquet"
    cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_kd_image_hashes", name)
    try:
        table = pq.read_table(cache).to_pydict()
        known = dict(zip(table["key"], table["hash"], strict=True))
    except (OSError, KeyError, pa.ArrowException):  # there is none yet, or it is damaged
        known = {}
    missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    if missing:
        with ThreadPoolExecutor() as pool:
            known |= zip(missing, pool.map(_hash_file, missing.values()), strict=True)
        entries = pa.table({"key": keys, "hash": pa.array([known[key] for key in keys], pa.uint64())})
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(entries, temporary)
            temporary.replace(cache)
        except OSError:  # a full or read-only disk: they are computed again next time
            temporary.unlink(missing_ok=True)
    return [known[key] for key in keys]


def sort_rows(hashes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows, int64 (n,), in the one order by which images are chosen, and their positions, float64 (n,) in [0, 1].

    Evaluation takes from the front, training from the end: a teacher could not be measured on what a larger fraction
    holds out, if training took from the front. An image's position is i / n if its hash (uint64) is the i-th smallest
    (from 0) of its class's n different ones, but 1 for the last, so that no class is held out as a whole. Equal images
    of several classes have the smallest of their positions, so that none is on both sides. Ties go by hash.
    """
    pairs = np.stack([labels.astype(np.uint64), hashes], axis=1)
    pairs, pair_of_row = np.unique(pairs, axis=0, return_inverse=True)
    _, start, size = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    rank, size = np.arange(len(pairs)) - np.repeat(start, size), np.repeat(size, size)
    positions = np.where(rank == size - 1, 1.0, rank / size)[pair_of_row.ravel()]
    different, hash_of_row = np.unique(hashes, return_inverse=True)
    smallest = np.ones(len(different))
    np.minimum.at(smallest, hash_of_row.ravel(), positions)
    positions = smallest[hash_of_row.ravel()]
    return np.lexsort((hashes, positions)), positions


def content_fingerprint(hashes: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of a split's images and labels, whatever their order."""
    pairs = np.stack([labels.astype(np.uint64), hashes], axis=1)
    return hashlib.sha256(pairs[np.lexsort(pairs.T)].astype("<u8").tobytes()).hexdigest()


def fingerprint(*parts: str | None) -> str:
    """SHA-256 of a list of texts, such as repository, commit, config and split."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def overlap(ours: dict[str, Any], theirs: dict[str, Any]) -> int | None:
    """How many of our evaluation images a teacher was trained on, by `ImageData.describe()` or the "data" of a record.

    It follows from the sizes (see `sort_rows`). None: another dataset, or a record without fingerprints.
    """
    our_prints, their_prints = (data.get("split_fingerprints") or {} for data in (ours, theirs))
    if not set(our_prints.values()) & set(their_prints.values()):
        return None
    if our_prints[ours["eval_split"]] != their_prints[theirs["train_split"]]:
        return 0  # another split of the same dataset
    return max(0, ours["eval_size"] + theirs["train_size"] - ours["split_sizes"][ours["eval_split"]])
