"""The order of an epoch: which rows, in which batches, by which process and, of a stream, by which loader worker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK_ROWS = 1024  # rows that are shuffled among themselves, from row groups that follow each other
# Of what follows, each reader (a loader worker of a process) holds so much as it is in the files. An image of ImageNet
# has 110 KB: these are 4,880 of them, a minute's at 81 images a second. 16 workers cover a minute at 1,300 images a
# second, with 8 GiB of memory.
READ_AHEAD = 512 * 2**20


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file: the rows `start` to `start + rows` of its split, `size` bytes in memory."""

    file: str
    index: int
    start: int
    rows: int
    size: int = 0


def groups_of(dataset) -> list[RowGroup] | None:
    """The row groups of a dataset that is read as a stream; None of any other, which may call anything its groups."""
    groups = getattr(dataset, "groups", None)
    return groups if isinstance(groups, list) and groups and isinstance(groups[0], RowGroup) else None


def epoch_order(groups: Sequence[RowGroup], seed: int | None, epoch: int) -> np.ndarray:
    """All rows in the order of an epoch: row groups shuffled, then rows within blocks; unchanged without a seed.

    Of a dataset that is not a stream all rows are one group, so that this is a permutation of them.
    """
    rows = [np.arange(group.start, group.start + group.rows) for group in groups]
    if seed is None:
        return np.concatenate(rows)
    rng = np.random.default_rng((seed, epoch))
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    sizes = np.array([len(group) for group in shuffled])
    block = np.repeat((np.cumsum(sizes) - sizes) // BLOCK_ROWS, sizes)  # of each row: where its group begins
    order = np.concatenate(shuffled)
    return order[np.lexsort((rng.random(len(order)), block))]


class Upcoming:
    """Which row groups a reader goes on with in an epoch.

    Args:
        groups: all row groups.
        order: all rows in the order of the epoch.
        ends: where in it the part of each reader ends; beyond, another one reads.
    """

    def __init__(self, groups: Sequence[RowGroup], order: np.ndarray, ends: Sequence[int]) -> None:
        self._sizes, self._order, self._ends = np.array([group.size for group in groups]), order, np.asarray(ends)
        self._starts, self._position = np.array([group.start for group in groups]), np.argsort(order)
        self._part: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def after(self, row: int) -> list[int]:
        """The row groups of rows that follow a row: those that are begun, and `READ_AHEAD` bytes of others."""
        at = int(self._position[row])
        part = int(np.searchsorted(self._ends, at, side="right"))
        if self._part is None or self._part[0] != part:
            start = int(self._ends[part - 1]) if part else 0
            places = np.searchsorted(self._starts, self._order[start : self._ends[part]], side="right") - 1
            found, first = np.unique(places, return_index=True)
            last = len(places) - 1 - np.unique(places[::-1], return_index=True)[1]
            by_first = np.argsort(first)
            self._part = part, found[by_first], start + first[by_first], start + last[by_first]
        _, found, first, last = self._part
        new = first > at
        sizes = self._sizes[found[new]]
        ahead = found[new][np.cumsum(sizes) - sizes < READ_AHEAD]  # one at least
        return [*found[~new & (last > at)].tolist(), *ahead.tolist()]


def batch_sizes(rows: int, batch_size: int, processes: int, drop_last: bool = False) -> list[int]:
    """The sizes of all batches of an epoch, one after the other for each process, as many for all of them.

    They are full but in the last step (or two), which the processes share evenly; `drop_last` leaves out what is not.
    """
    steps, step = math.ceil(rows / (batch_size * processes)), batch_size * processes
    if drop_last:
        if rows < step:
            raise ValueError(
                f"{rows} images fill no step of {step}, and dataloader_drop_last leaves all others out: set "
                "--dataloader_drop_last False, or a smaller --per_device_train_batch_size."
            )
        return [batch_size] * (rows // step * processes)
    totals = [step] * (steps - 1) + [rows - step * (steps - 1)]
    if totals[-1] < processes:  # someone would have none
        missing = processes - totals[-1]
        if steps < 2 or step - missing < processes:
            raise ValueError(
                f"{rows} images cannot be shared by {processes} processes in batches of {batch_size}: take larger "
                "ones with per_device_train_batch_size, or fewer processes."
            )
        totals[-2:] = [step - missing, processes]
    return [total // processes + (rank < total % processes) for total in totals for rank in range(processes)]


def batches(order: np.ndarray, sizes: Sequence[int], processes: int, workers: int) -> list[np.ndarray]:
    """All batches of an epoch, without rows beyond the sum of the sizes.

    Each reader has consecutive parts of the order, so that it reads few row groups.
    Batch i is that of process i % processes; of its batches, each goes to the next of its `workers` readers.
    """
    by_reader = np.argsort(_readers(len(sizes), processes, workers), kind="stable")
    parts = np.split(order, np.cumsum(np.asarray(sizes)[by_reader]))
    return [parts[i] for i in np.argsort(by_reader)]


def reader_ends(sizes: Sequence[int], processes: int, workers: int) -> np.ndarray:
    """Where in the order of an epoch the part of each reader ends; the last one has what no batch has."""
    rows = np.bincount(_readers(len(sizes), processes, workers), sizes).astype(int)
    return np.append(np.cumsum(rows), np.iinfo(int).max)


def _readers(count: int, processes: int, workers: int) -> np.ndarray:
    """The reader of each of so many batches."""
    step, rank = np.divmod(np.arange(count), processes)
    return rank * max(1, workers) + step % max(1, workers)


def reading_factor(groups: Sequence[RowGroup], every: Sequence[np.ndarray], processes: int, workers: int) -> float:
    """How often a row is read in an epoch, on average: each reader that has a row of a row group reads all of it."""
    starts, rows = np.array([(group.start, group.rows) for group in groups]).T
    readers = np.repeat(_readers(len(every), processes, workers), [len(batch) for batch in every])
    places = np.searchsorted(starts, np.concatenate(every), side="right") - 1
    _, read = np.unique([readers, places], axis=1)
    return float(rows[read].sum() / rows.sum())


def spaced_rows(groups: Sequence[RowGroup], count: int, places: int = 8) -> list[int]:
    """At most `count` rows from a few row groups that are evenly spaced, so that few are read."""
    places = min(places, len(groups))
    chosen = [groups[i * len(groups) // places] for i in range(places)]
    rows = [range(group.start, group.start + min(group.rows, math.ceil(count / places))) for group in chosen]
    return [row for part in rows for row in part][:count]


class EpochSampler(BatchRebalanceSampler):
    """The batches of one process in an epoch: each row once, and as many steps for all processes.

    The images of a step do not depend on the number of processes that share them, except for those of a stream, of
    which each reader has row groups of its own. A `BatchRebalanceSampler` because that is what transformers takes as
    a sampler of batches which knows its rank.

    Args:
        dataset: any map-style dataset; one with `groups` is read as a stream is.
        batch_size: images of one process.
        readers: number of processes, rank of this one, and its number of loader workers.
        drop_last: see `batch_sizes`.
        seed: see `epoch_order`.
    """

    def __init__(
        self, dataset, batch_size: int, readers: tuple[int, int, int], drop_last: bool = False, seed: int | None = 0
    ) -> None:
        self.processes, self.rank, self.workers = readers
        self.order_seed, self.epoch, rows = seed, 0, len(dataset)
        self.sizes = batch_sizes(rows, batch_size, self.processes, drop_last)
        self.groups = groups_of(dataset)
        self._blocks = self.groups or [RowGroup("", 0, 0, rows)]
        if self.groups:
            dataset.reader_ends = reader_ends(self.sizes, self.processes, self.workers)
        factor = reading_factor(self.groups, self._batches(), self.processes, self.workers) if self.groups else 1.0
        if factor > 1.2:
            logger.warning_once(
                f"{self.processes} processes with {max(1, self.workers)} loader workers read {len(self._blocks)} "
                f"row groups, so that each image is read {factor:.1f} times: use fewer --dataloader_num_workers, or "
                "files with more row groups."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._batches()[self.rank :: self.processes])

    def _batches(self) -> list[np.ndarray]:
        readers = (self.processes, self.workers) if self.groups else (1, 0)
        return batches(epoch_order(self._blocks, self.order_seed, self.epoch), self.sizes, *readers)

    def __len__(self) -> int:
        return len(self.sizes) // self.processes


def sampler_of(args, dataset, batch_size: int, is_training: bool) -> EpochSampler | list[int] | None:
    """What the loader of a process with these arguments of a trainer draws from: batches of rows for training, rows
    for an evaluation of a stream, whose batches accelerate shares among the processes; None: the rows as they are."""
    groups, sequential = groups_of(dataset), args.train_sampling_strategy == "sequential"
    processes, workers = args.world_size, args.dataloader_num_workers
    if is_training:
        if sequential and groups:
            raise ValueError(
                "a stream is shuffled in blocks, train_sampling_strategy='sequential' is not supported: leave it out, "
                "or leave --streaming out."
            )
        readers, seed = (processes, args.process_index, workers), None if sequential else args.data_seed
        return EpochSampler(dataset, batch_size, readers, args.dataloader_drop_last, seed)
    return evaluation_order(dataset, batch_size, processes, workers) if groups else None


def evaluation_order(dataset, batch_size: int, processes: int, workers: int) -> list[int]:
    """The rows of a stream in an order in which each reader has row groups of its own."""
    rows = epoch_order(dataset.groups, None, 0)
    full, rest = divmod(len(rows), batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    dataset.reader_ends = reader_ends(sizes, processes, workers)
    return np.concatenate(batches(rows, sizes, processes, workers)).tolist()
