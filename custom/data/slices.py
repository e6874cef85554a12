# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Two-dimensional training samples drawn across cases, each case prepared once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose
from torch.utils.data import Dataset, DistributedSampler
from tqdm import tqdm

from custom.console import bar_interval, describe_error, list_failures
from custom.data.content import ContentHasher, transform_key
from custom.data.files import atomic_folder, write_json

__all__ = ["EpochSampler", "SliceDataset"]

LAYOUT = "1"  # part of the cache key: raise it when the files below change their meaning


class SliceDataset(Dataset):
    """Axial slices of volumes, and plain slices, as samples of one data set.

    Each case goes once through ``prepare`` (deterministic: load, orient, window, resize); the result is
    kept on disk under a key of the files' content and of the transforms, one memory-mapped array a case,
    so memory does not grow with the number of cases and a changed file or transform is never served
    from an old cache. ``augment`` then sees one slice at a time.

    An item is asked for by ``(epoch, index)``, as :class:`EpochSampler` yields it, or by a plain index,
    which means epoch 0. Its augmentation depends on the seed, the epoch and the index alone, not on
    workers, order or what was drawn before.

    Args:
        data: cases with ``image`` and ``label`` paths.
        prepare: deterministic transforms; they yield ``image`` (C, H, W) or (C, H, W, D) and ``label``
            of the same spatial shape.
        augment: transforms of one slice: image (C, H, W) float32 and label (C, H, W) float32.
        cache_dir: folder for prepared cases.
        seed: seed of the augmentation.
        select: ``"all"`` slices, those in the ``"lung"`` (prepare must yield a ``lung`` mask), or those
            with a ``"lesion"``.
        part: keep the slices from this to that fraction of all, in an order drawn from the seed:
            ``(0.0, 0.8)`` and ``(0.8, 1.0)`` make the random split by slice of some papers, whose test slices
            have neighbours of the same patient in training. ``None`` keeps all.
        num_workers: processes that prepare cases not in the cache yet.

    Raises:
        ValueError: When ``select`` is unknown, cases cannot be prepared (all of them are named, and the
            others are in the cache then), or no slice is left.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        prepare: Callable,
        augment: Callable,
        cache_dir: str | Path,
        seed: int = 0,
        select: str = "all",
        part: tuple[float, float] | None = None,
        num_workers: int = 0,
    ) -> None:
        if select not in ("all", "lung", "lesion"):
            raise ValueError(f"select must be 'all', 'lung' or 'lesion', found '{select}'")
        if part is not None and not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part must be two rising fractions within 0 and 1, found {tuple(part)}")
        self.data = list(data)
        self.prepare = prepare if isinstance(prepare, Compose) else Compose(prepare)
        self.augment = augment if isinstance(augment, Compose) else Compose(augment)
        self.cache_dir = Path(cache_dir)
        self.seed = seed
        self.select = select
        self.part = part
        self.num_workers = num_workers

    @cached_property
    def _folders(self) -> list[Path]:
        transforms = transform_key(self.prepare)
        hasher = ContentHasher(self.cache_dir)
        folders = [self.cache_dir / hasher.key(case, LAYOUT, transforms) for case in self.data]
        hasher.save()
        return folders

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """For every sample its case and its slice; prepares the cases that are not in the cache."""
        self._prepare_missing()
        cases, slices = [], []
        for number, folder in enumerate(self._folders):
            chosen = json.loads((folder / "case.json").read_text(encoding="utf-8"))[self.select]
            cases.append(np.full(len(chosen), number, dtype=np.int32))
            slices.append(np.asarray(chosen, dtype=np.int32))
        index = np.concatenate(cases), np.concatenate(slices)
        if not len(index[0]):
            raise ValueError(f"none of the {len(self.data)} cases has a slice of the kind '{self.select}'")
        if self.part is not None:
            order = np.random.default_rng(self.seed).permutation(len(index[0]))
            first, last = (round(fraction * len(order)) for fraction in self.part)
            kept = np.sort(order[first:last])
            index = index[0][kept], index[1][kept]
        return index

    def _prepare_missing(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Every process does its share, then all read all. The share goes by position, not by what is missing:
        # a process that looks later may find less missing, and a case would be nobody's.
        world = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        mine = {folder: i for i, folder in enumerate(self._folders) if i % world == rank}  # each once
        missing = [i for folder, i in mine.items() if not _is_whole(folder)]
        failures: list[dict[str, str]] = []
        if missing:
            loader = DataLoader(
                cast(Dataset, _Preparation(self, missing)),
                batch_size=None,
                num_workers=min(self.num_workers, len(missing)),
                collate_fn=_as_is,
                # Else the network's first weights would depend on what had been prepared before.
                generator=torch.Generator(),
            )
            bar = tqdm(
                loader, desc="preparing cases", unit="case", dynamic_ncols=True, mininterval=bar_interval()
            )
            failures = [failure for failure in bar if failure]
        if distributed:
            shares: list[Any] = [None] * world
            torch.distributed.all_gather_object(shares, failures)
            failures = [failure for share in shares for failure in share]
        if failures:  # all at once: whoever mends the data wants to know of all that is wrong
            raise ValueError(
                f"{len(failures)} of {len(self.data)} cases cannot be prepared: {list_failures(failures)}; "
                "mend them, or take them off the data list"
            )

    def prepare_case(self, number: int) -> None:
        """Prepare one case and put it into the cache, whole or not at all.

        Args:
            number: position of the case in ``data``.

        Raises:
            ValueError: When image and label differ in shape.
        """
        case, folder = self.data[number], self._folders[number]
        prepared = cast(dict, self.prepare(dict(case)))
        image, label = np.asarray(prepared["image"]), np.asarray(prepared["label"])
        if image.shape[1:] != label.shape[1:]:
            raise ValueError(
                f"image {case['image']} and label {case['label']} differ after preparation: "
                f"{image.shape[1:]} and {label.shape[1:]} voxels"
            )
        lung = np.asarray(prepared["lung"]) if "lung" in prepared else None
        if _is_whole(folder):
            return  # another process was faster
        found = {
            "all": list(range(len(_slices_first(image)))),
            "lesion": _nonempty(label),
            "lung": [] if lung is None else _nonempty(lung),
        }
        with atomic_folder(folder) as temporary:
            # Half precision keeps a [0, 1] window to better than one HU in a thousand.
            np.save(temporary / "image.npy", _slices_first(image).astype(np.float16))
            np.save(temporary / "label.npy", _slices_first(label).astype(np.uint8))
            write_json(temporary / "case.json", found)

    def __len__(self) -> int:
        return len(self._index[0])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        case, position = (int(values[index]) for values in self._index)
        folder = self._folders[case]
        sample: dict[str, Any] = {"name": f"{self.data[case].get('name', case)}_slice_{position:04d}"}
        for name in ("image", "label"):
            stored = np.load(folder / f"{name}.npy", mmap_mode="r")
            sample[name] = MetaTensor(torch.from_numpy(stored[position].astype(np.float32)))
        self.augment.set_random_state(seed=_sample_seed(self.seed, epoch, index))
        return cast(dict, self.augment(sample))


class EpochSampler(DistributedSampler):
    """Yields ``(epoch, index)``, so that a data set can derive each sample's randomness from them.

    The order depends on the seed and the epoch only. It is a ``DistributedSampler``: MONAI's engines
    tell it the epoch, and processes of a distributed run draw disjoint shares.

    Args:
        dataset: what is drawn from.
        seed: seed of the order.
        shuffle: whether to shuffle.
        passes: how often each batch is drawn in a row; above 1 the last, smaller batch is left out.
        batch_size: samples of a batch, needed where ``passes`` is above 1.
        repeats: how often one epoch goes through the data set, in a new order with new augmentation each
            time: epochs, and with them validation and checkpoints, of a useful length from few slices.

    Raises:
        ValueError: When ``passes`` or ``repeats`` is below 1 or no batch is full.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        shuffle: bool = True,
        passes: int = 1,
        batch_size: int = 1,
        repeats: int = 1,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
            shuffle=shuffle,
            seed=seed,
        )
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        if passes < 1 or (passes > 1 and self.num_samples * repeats < batch_size):
            raise ValueError(f"{passes} passes over batches of {batch_size} from {self.num_samples} samples")
        self.passes = passes
        self.batch_size = batch_size
        self.repeats = repeats

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        keys = []
        epoch = self.epoch
        for repeat in range(self.repeats):
            self.epoch = epoch * self.repeats + repeat
            keys += [(self.epoch, index) for index in super().__iter__()]
        self.epoch = epoch
        if self.passes > 1:
            full = range(0, len(keys) - self.batch_size + 1, self.batch_size)
            keys = [key for start in full for key in keys[start : start + self.batch_size] * self.passes]
        return iter(keys)

    def __len__(self) -> int:
        samples = int(self.num_samples) * self.repeats
        return samples if self.passes == 1 else samples // self.batch_size * self.batch_size * self.passes


class _Preparation:
    """Preparing as a data set, so that a data loader's workers can do it."""

    def __init__(self, slices: SliceDataset, numbers: Sequence[int]) -> None:
        self.slices = slices
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, str]:
        """Name and reason of the case if it failed, or nothing."""
        if position >= len(self.numbers):
            raise IndexError(position)
        number = self.numbers[position]
        try:
            self.slices.prepare_case(number)
        except Exception as error:
            reason = describe_error(error)
            if reason is None:
                raise
            return {"name": self.slices.data[number].get("name", f"case {number}"), "reason": reason}
        return {}


def _as_is(item: Any) -> Any:
    return item


def _sample_seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


def _is_whole(folder: Path) -> bool:
    """Whether a prepared case is there and nothing of it is cut off."""
    try:
        count = len(json.loads((folder / "case.json").read_text(encoding="utf-8"))["all"])
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "label")]
    except (OSError, EOFError, ValueError, KeyError):  # what numpy and JSON make of torn files
        return False
    return all(len(array) == count for array in arrays)


def _slices_first(volume: np.ndarray) -> np.ndarray:
    """(C, H, W) or (C, H, W, D) to (D, C, H, W)."""
    return np.ascontiguousarray(volume[None] if volume.ndim == 3 else np.moveaxis(volume, -1, 0))


def _nonempty(mask: np.ndarray) -> list[int]:
    slices = _slices_first(mask)
    return [int(i) for i in np.flatnonzero(slices.reshape(len(slices), -1).any(axis=1))]
