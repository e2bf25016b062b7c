"""Class names and class mappings: of which classes of one list each class of another is made."""

import functools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

_WORDNET_ID = re.compile(r"n\d{8}(?!\d)")
_SHOWN = 8  # names in a message


def label_maps(names: Sequence[str] | Mapping[int, str]) -> dict:
    """`id2label` and `label2id` of a config, from class names in order (or an id2label)."""
    id2label = {int(i): str(n) for i, n in (names.items() if isinstance(names, Mapping) else enumerate(names))}
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label must number its {len(id2label)} classes from 0 on, it has {sorted(id2label)[:8]}.")
    id2label = dict(sorted(id2label.items()))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def name_classes(config, id2label) -> None:
    config.id2label, config.label2id = label_maps(id2label).values()
    config.num_labels = len(config.id2label)  # of most configs the same fact, of PVT's one of its own
    if config.model_type == "timm_wrapper":  # timm's own key, which is the one that is saved
        config.label_names = list(config.id2label.values())


@dataclass(frozen=True)
class ClassMapping:
    """Of which source classes (a teacher's, a checkpoint's) each target class (the data's) is made.

    `members` are, for each target class, the indices of its source classes; no source class is in two.
    """

    members: tuple[tuple[int, ...], ...]
    source_names: tuple[str, ...]
    target_names: tuple[str, ...]

    @classmethod
    def between(cls, source, target, class_map=None) -> Self:
        """The mapping from the source's classes to the target's, each given as names in label order or as an id2label.

        Without `class_map`, and for what a dict leaves out, classes are matched by name: the whole name, else the
        WordNet id (known for ImageNet's classes in their usual order, whatever they are called), else one of the
        synonyms that ImageNet's names list, if one class alone has it. Case, underscores and hyphens do not count.

        `class_map` is `"by_index"` (the i-th is the i-th), a list with an entry for each target class, a dict from
        target names to entries, or what `read_class_map` reads these from. An entry is the name, the WordNet id or the
        index of a source class, or a list of these, whose probabilities are added.

        ValueError for classes that are missing, ambiguous or used twice, with a `class_map` that can be typed.
        """
        source, target = (tuple(label_maps(names)["id2label"].values()) for names in (source, target))
        class_map, counts_differ = read_class_map(class_map), ""
        if class_map == "by_index" and len(source) != len(target):
            counts = f"the teacher has {len(source)} classes, the data {len(target)}"
            class_map, counts_differ = None, f'class_map="by_index" needs equal counts, {counts}: '
        # Names that occur twice are no question in two equal lists.
        if class_map == "by_index" or (class_map is None and [*map(name_key, source)] == [*map(name_key, target)]):
            return cls(tuple((i,) for i in range(len(source))), source, target)
        entries = _entries(class_map, source, target)
        candidates = iter(_candidates(source, [*chain(*entries)]))
        found = [[(item, next(candidates)) for item in entry] for entry in entries]
        members = [tuple(dict.fromkeys(indices[0] for _, indices in row if len(indices) == 1)) for row in found]
        uses = Counter(chain(*members))
        shared = [i for i, indices in enumerate(members) if any(uses[j] > 1 for j in indices)]
        unclear = [i for i, row in enumerate(found) if any(len(indices) != 1 for _, indices in row)]
        if unclear or shared:
            raise ValueError(counts_differ + _unmatched(source, target, entries, found, shared, unclear))
        if counts_differ:
            raise ValueError(f"{counts_differ}leave class_map out: all classes are found by name.")
        return cls(tuple(members), source, target)

    @functools.cached_property
    def rows(self) -> list[int] | None:
        """The source index of each target class; None if a class is made of several."""
        return [m[0] for m in self.members] if all(len(m) == 1 for m in self.members) else None

    @property
    def kind(self) -> str:
        """identity, permutation, subset (some source classes are left out) or many-to-one."""
        if self.rows is None:
            return "many-to-one"
        if len(self.rows) < len(self.source_names):
            return "subset"
        return "identity" if self.rows == sorted(self.rows) else "permutation"

    @functools.cached_property
    def index(self) -> torch.Tensor:
        """int64 `(targets, most members)`; a class of fewer members is filled up with the count of source classes."""
        width, blank = max(map(len, self.members)), len(self.source_names)
        return torch.tensor([[*m, *[blank] * (width - len(m))] for m in self.members])

    def apply(self, logits: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(B, targets)` from the source's `(B, sources)`; `index` is `self.index` on their device.

        Of a permutation they are the same numbers. Else they are log-probabilities at temperature 1, of a class the
        logsumexp of its members'; softmax renormalises them over the classes that are kept.
        """
        index = self.index.to(logits.device) if index is None else index
        if self.kind in ("identity", "permutation"):
            return logits.index_select(1, index[:, 0])
        return F.pad(logits.log_softmax(1), (0, 1), value=-torch.inf)[:, index].logsumexp(2)

    def dropped_mass(self, mapped: torch.Tensor) -> torch.Tensor:
        """`(B,)` in [0, 1]: the probability of the source classes that are left out, from what `apply` gave."""
        if sum(map(len, self.members)) == len(self.source_names):
            return mapped.new_zeros(len(mapped))
        return -torch.expm1(mapped.logsumexp(1)).clamp(max=0)

    def describe(self) -> dict:
        """For the record: the kind, both counts, and (unless it is the identity) `[target, {index: source}]` pairs."""
        text = {"kind": self.kind, "source_classes": len(self.source_names), "target_classes": len(self.target_names)}
        if self.kind != "identity":
            parts = [{i: self.source_names[i] for i in indices} for indices in self.members]
            text["classes"] = [list(pair) for pair in zip(self.target_names, parts, strict=True)]
        return text


def read_class_map(value):
    """A class map (None, "by_index", list or dict) from itself, its JSON text, or the path of a JSON or YAML file."""
    if value is None or value == "by_index" or not isinstance(value, (str, os.PathLike)):
        return value
    import yaml

    try:
        if str(value).lstrip().startswith(("{", "[")):
            return json.loads(str(value))
        class_map = yaml.safe_load(Path(value).expanduser().read_text(encoding="utf-8"))  # JSON is YAML
    except json.JSONDecodeError as error:
        raise ValueError(f"class_map is not valid JSON ({error}): {value}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"class_map: {value} cannot be read as YAML or JSON: {error}") from error
    except OSError as error:
        expected = f"it is not by_index, not JSON, and there is no such file (seen from {os.getcwd()})"
        raise ValueError(f"class_map={value!r} is not understood: {expected}.") from error
    if not isinstance(class_map, (list, dict)):
        raise ValueError(f"class_map: {value} holds no list and no mapping of classes, but {class_map!r:.80}.")
    return class_map


def read_class_names(given) -> list[str] | None:
    """Class names in the order of their labels (None or a list) from themselves, or from a file: a JSON or YAML list,
    or any other file with one name in each line."""
    names = given
    if isinstance(given, (str, os.PathLike)):
        import yaml

        path = Path(given).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark of the byte order
            structured = path.suffix in (".json", ".yaml", ".yml")  # whose values are all read as texts: no, 010
            names = yaml.load(text, yaml.BaseLoader) if structured else text.splitlines()
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"class_names: {given} cannot be read (seen from {os.getcwd()}): {error}") from error
    if given is None:
        return None
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"class_names: no list of names in {given!r:.80}, but {names!r:.80}.")
    if others := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"class_names has {others[0]!r}, which is no text: put each name in quotes.")
    names = [name.strip() for name in names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or "" in names:
        problem = f"names {', '.join(repeated[:5])} twice" if "" not in names else "has an empty name"
        raise ValueError(f"class_names {problem}: give each class a name of its own, in the order of the labels.")
    return names


def head_rows(own: Mapping[int, str], names) -> tuple[list[int] | None, int]:
    """The row of a checkpoint's head for each class of the data (None if the head must be new), and how many are new.

    Where it does not know all classes and the counts are equal, the others take the remaining rows in order.
    """
    source, target = (list(label_maps(x)["id2label"].values()) for x in (own, names))
    if source == [f"LABEL_{i}" for i in range(len(source))]:  # transformers' names for a model that has none
        return (list(range(len(target))) if len(source) == len(target) else None), 0
    try:
        return ClassMapping.between(source, target).rows, 0
    except ValueError:
        if len(source) != len(target):
            return None, 0
    found = [indices[0] if len(indices) == 1 else None for indices in _candidates(source, target)]
    found = [i if found.count(i) == 1 else None for i in found]
    others = iter(sorted(set(range(len(source))) - set(found)))
    return [next(others) if i is None else i for i in found], found.count(None)


def check_class_order(data: list[str], student: dict[int, str]) -> None:
    """The i-th class of the data must be the student's i-th: else it learns, and is saved with, wrong names."""
    rows, renamed = head_rows(student, data)
    if rows is None or renamed or len(data) != len(student):
        differ = [(name, student.get(i)) for i, name in enumerate(data) if name != student.get(i)][:5]
        problem = f"the data have {len(data)} classes, the student {len(student)}, and their names differ: {differ}"
    elif rows != sorted(rows):
        problem = "data and student have the same classes in another order"
    else:
        return
    raise ValueError(f"{problem}: load the student with load_student(..., id2label=names in the order of the data).")


def name_key(name) -> str:
    """Class names are compared without regard to case, underscores, hyphens and surrounding space."""
    return re.sub(r"[\s_\-]+", " ", str(name)).strip().casefold()


@functools.cache
def _imagenet(subset: str = "imagenet-1k"):
    from timm.data import ImageNetInfo  # which takes seconds

    return ImageNetInfo(subset)


def _synonyms(name: str) -> set[str]:
    """Keys of all that "tench, Tinca tinca: a fish", "n01440764" or "n01440764-tench" call their class."""
    if wordnet := _WORDNET_ID.match(name):
        try:
            lemmas = _imagenet().label_name_to_description(wordnet.group())
        except KeyError:  # no class of any ImageNet
            lemmas = ""
        name = f"{name[wordnet.end() :]},{lemmas}"
    return {name_key(word) for word in name.partition(":")[0].split(",")} - {""}


def _wordnet_ids(names: Sequence[str]) -> list[str | None]:
    """The WordNet id that each name starts with, or by its place where the names are an ImageNet's in its order."""
    ids = [match and match.group() for match in map(_WORDNET_ID.match, names)]
    if len(names) >= 1000 and not any(ids):
        from timm.data import infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": len(names)})
        expected = _imagenet(subset).label_descriptions() if subset else []
        same = [not _synonyms(a).isdisjoint(_synonyms(b)) for a, b in zip(names, expected, strict=False)]
        if sum(same) > len(names) / 2:  # of classes in another order it is next to none
            ids = [i if agrees else None for i, agrees in zip(_imagenet(subset).label_names(), same, strict=True)]
    return ids


def _entries(class_map, source: Sequence[str], target: Sequence[str]) -> list[list]:
    """For each target class the names and indices of its source classes, as a list or dict says; else its own name."""
    entries: list = list(target)
    if isinstance(class_map, (list, tuple)):
        if len(class_map) != len(target):
            raise ValueError(f"class_map needs an entry for each of {len(target)} classes, it has {len(class_map)}.")
        entries = list(class_map)
    elif class_map:
        place = {name_key(name): i for i, name in enumerate(target)}
        unknown = [name for name in class_map if name_key(name) not in place]
        if unknown:
            known = f"it has {list(target)[:_SHOWN]}"
            raise ValueError(f"class_map names classes that the data does not have: {unknown[:_SHOWN]}; {known}.")
        for name, entry in class_map.items():
            entries[place[name_key(name)]] = entry
    entries = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in entries]
    for item in chain.from_iterable(entry or [entry] for entry in entries):
        if type(item) not in (int, str) or (type(item) is int and not 0 <= item < len(source)):
            raise ValueError(f"class_map has {item!r}, which is no name and no index in [0, {len(source)}).")
    return entries


def _places(groups) -> dict:
    """For each key its places in a sequence of groups of keys."""
    places: dict = {}
    for i, group in enumerate(groups):
        for key in group:
            places.setdefault(key, []).append(i)
    return places


def _candidates(source: Sequence[str], items: Sequence[str | int]) -> list[list[int]]:
    """For each name (or index) the source classes that it may mean: one, if it is found."""
    by_name = _places([name_key(name)] for name in source)
    found = [[item] if isinstance(item, int) else by_name.get(name_key(item), []) for item in items]
    if all(len(indices) == 1 for indices in found) and len({i for (i,) in found}) == len(items):
        return found
    names = [str(item) for item in items]
    ids, counts = _wordnet_ids(names), Counter(map(name_key, names))
    by_id = _places([i] for i in _wordnet_ids(source)) if any(ids) else {}
    by_word = _places(map(_synonyms, source))
    for i, name in enumerate(names):
        if isinstance(items[i], int):
            continue
        if (len(found[i]) != 1 or counts[name_key(name)] > 1) and ids[i] and ids[i] in by_id:
            found[i] = by_id[ids[i]]
        elif not found[i]:
            found[i] = sorted(set(chain.from_iterable(by_word.get(word, []) for word in _synonyms(name))))
    return found


def _unmatched(source, target, entries: list[list], found: list[list], shared: list[int], unclear: list[int]) -> str:
    """The message about classes that are not matched, with ways to say which is which that work as they stand."""
    todo = sorted({*shared, *unclear})
    missing = [item for item, indices in chain(*found) if not indices]
    several = [(item, indices[:_SHOWN]) for item, indices in chain(*found) if len(indices) > 1]
    used = {indices[0] for i in set(range(len(found))).difference(todo) for _, indices in found[i]}
    free = [i for i in range(len(source)) if i not in used]
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of the data's {len(target)} classes have no class of that name in the teacher: "
            f"{missing[:_SHOWN]}; the teacher's unmatched ones: {[source[i] for i in free[:_SHOWN]]}"
        )
    if several:
        parts.append(f"the teacher has several classes of the name: {dict(several[:_SHOWN])}")
    if shared:
        names = [target[i] for i in shared[:_SHOWN]]
        parts.append(f"names are not unique, one class of the teacher would be that of {names}")
    if len(todo) > len(free):
        parts.append(f"it has {len(source)} classes, too few: use a teacher that knows the data's {len(target)}")
        return f"{'; '.join(parts)}."
    ways = ["a list of the teacher's indices, or the path of a JSON or YAML file of either (--class_map FILE)"]
    if len(source) == len(target):
        ways.insert(0, '"by_index" (--class_map by_index)')
    if len(todo) <= _SHOWN and len(set(map(name_key, target))) == len(target):
        guess: dict[str, Any] = {name: entry for name, entry in zip(target, entries, strict=True) if entry != [name]}
        keys = [name_key(name) for name in source]
        for i in todo:
            j = next((j for _, indices in found[i] for j in indices if j in free), free[0])
            guess[target[i]] = source[j] if keys.count(keys[j]) == 1 else j
            free.remove(j)
        text = json.dumps(guess, ensure_ascii=False)
        ways.insert(0, f"{text} (--class_map {shlex.quote(text)})")
    return f"{'; '.join(parts)}. Say which class is which with class_map={', '.join(ways)}."
