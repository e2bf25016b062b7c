"""Class mappings: how names are matched, what is refused with which hints, and the arithmetic against float64."""

import json
import re
import shlex

import numpy as np
import pytest
import timm
import torch
import yaml

from hf_kd.labels import ClassMapping, head_rows, label_maps, read_class_map

NAMES = ["tabby cat", "fire truck", "daisy", "great white shark", "golf ball", "moped"]
between = ClassMapping.between


@pytest.fixture(scope="module")
def imagenet():
    """The names of ImageNet's classes in timm's order, "crane" twice."""
    return timm.data.ImageNetInfo().label_descriptions()


# ---- what matches ----


@pytest.mark.parametrize(
    ("target", "class_map", "rows", "kind"),
    [
        (NAMES, None, [0, 1, 2, 3, 4, 5], "identity"),
        (
            ["Daisy", "FIRE_TRUCK", " golf-ball ", "Moped", "tabby__cat", "Great white Shark"],
            None,
            [2, 1, 4, 5, 0, 3],
            "permutation",
        ),
        (["moped", "tabby cat"], None, [5, 0], "subset"),
        (["a", "b", "c", "d", "e", "f"], "by_index", [0, 1, 2, 3, 4, 5], "identity"),
        (["a", "b", "c"], [5, 0, 2], [5, 0, 2], "subset"),
        (["a", "b", "c"], (5, "tabby cat", "Daisy"), [5, 0, 2], "subset"),
        (["daisy", "firetruck", "cat"], {"Firetruck": "fire_truck", "cat": 0}, [2, 1, 0], "subset"),
    ],
)
def test_names_indices_lists_and_dicts(target, class_map, rows, kind):
    mapping = between(NAMES, dict(enumerate(target)), class_map)
    assert mapping.rows == rows and mapping.kind == kind
    assert mapping.source_names == tuple(NAMES) and mapping.target_names == tuple(target)
    text = mapping.describe()
    assert (text["kind"], text["source_classes"], text["target_classes"]) == (kind, 6, len(target))
    if kind != "identity":
        assert text["classes"] == [[name, {i: NAMES[i]}] for name, i in zip(target, rows, strict=True)]


def test_a_class_map_in_a_file_or_as_json(tmp_path, monkeypatch):
    class_map = {"animal": ["tabby cat", 3], "plant": "daisy"}
    (tmp_path / "map.json").write_text(json.dumps(class_map))
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(class_map))
    (tmp_path / "list.yml").write_text(yaml.safe_dump(list(class_map.values())))
    monkeypatch.chdir(tmp_path)
    for value in (class_map, json.dumps(class_map), "map.json", tmp_path / "map.yaml", "list.yml"):
        assert between(NAMES, ["animal", "plant"], value).members == ((0, 3), (2,))
    assert read_class_map("by_index") == "by_index" and read_class_map(None) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("just text", "no list and no mapping"),
        ("{a: [", "cannot be read as YAML or JSON"),
        (None, "not by_index.*no such file"),
    ],
)
def test_a_file_that_holds_no_class_map(content, message, tmp_path):
    file = tmp_path / "map.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_map(str(file))
    with pytest.raises(ValueError, match="not valid JSON"):
        read_class_map("{a: b}")


def test_synonyms_and_wordnet_ids_find_imagenets_classes(imagenet):
    ids = timm.data.ImageNetInfo().label_names()
    data = ["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck"]
    rows = [0, 217, 482, 491, 497, 566, 569]
    assert between(imagenet, data).rows == rows
    assert between(imagenet, [ids[i] for i in rows]).rows == rows
    assert between(imagenet, [f"{ids[i]}-{name}" for i, name in zip(rows, data, strict=True)]).rows == rows
    assert between(data[::-1], [ids[i] for i in rows]).rows == [6, 5, 4, 3, 2, 1, 0]  # a small teacher, by its words
    assert between(imagenet, ["bird", "machine"], {"bird": ids[134], "machine": ids[517]}).rows == [134, 517]


def test_names_that_imagenet_has_twice_are_told_apart(imagenet):
    """By place, where all names stand in ImageNet's order: here the data's folders are in another."""
    info = timm.data.ImageNetInfo()
    other = [*imagenet[:517], "Crane", *imagenet[518:639], "maillot", *imagenet[640:]]
    assert other != imagenet and imagenet.count("crane") == 2
    assert between(imagenet, other).rows == list(range(1000))
    folders = list(reversed(info.label_names()))
    assert between(imagenet, folders).rows == list(range(999, -1, -1))
    assert between(folders, other).rows == list(range(999, -1, -1))
    with pytest.raises(ValueError, match=r"several classes of the name: \{'crane': \[134, 517\]\}"):
        between(imagenet, ["crane", "flamingo"])


def test_a_teacher_of_21843_classes_knows_ten_of_them(imagenet):
    info = timm.data.ImageNetInfo("imagenet-21k-goog")
    names, ids = info.label_descriptions(), info.label_names()
    wanted = timm.data.ImageNetInfo().label_names()[:10]
    assert len(names) == 21843
    assert between(names, wanted).rows == [ids.index(i) for i in wanted]


def test_equal_lists_match_though_names_occur_twice():
    assert between(["crane", "moped", "crane"], ["Crane", "Moped", "crane"]).rows == [0, 1, 2]


# ---- what is refused, and that its hints work ----

REFUSED = [
    (NAMES, NAMES[:5] + ["tulip"], None, r"1 of the data's 6 classes .*\['tulip'\].*\['moped'\]"),
    (NAMES, ["tulip", "oak", "daisy"], None, r"2 of the data's 3 classes .*\['tulip', 'oak'\]"),
    (NAMES, NAMES[:4] + ["it's"], "by_index", 'teacher has 6 classes, the data 5.*\\["it\'s"\\]'),
    (NAMES, NAMES[:5], "by_index", "teacher has 6 classes, the data 5: leave class_map out"),
    (NAMES, NAMES[:5] + ["Daisy"], None, r"not unique.*\['daisy', 'Daisy'\]"),
    (NAMES, NAMES[:5] + ["bike"], {"bike": "motorbike"}, r"\['motorbike'\].*\['moped'\]"),
    (NAMES, NAMES[:5] + ["bike"], {"bike": "daisy"}, r"not unique.*\['daisy', 'bike'\]"),
    (NAMES, ["cat", "car", "bike"], {"cat": [0, "daisy"], "car": "x"}, r"2 of the data's 3 classes.*\['x', 'bike'\]"),
    (["crane", "moped", "crane"], ["bird", "moped", "crane"], None, r"\['bird'\].*crane.*\[0, 2\]"),
    (["crane", "moped", "crane"], ["crane"], None, r"\{'crane': \[0, 2\]\}"),
    ([f"t {i}" for i in range(20)], [f"d {i}" for i in range(20)], None, "20 of the data's 20"),
    (NAMES, NAMES[:5] + ["bike"], {"byke": "moped"}, r"does not have: \['byke'\]"),
    (NAMES, NAMES, "by_name", "'by_name' is not understood"),
    (NAMES, NAMES, [0, 1, 2, 3, 4], "an entry for each of 6 classes, it has 5"),
    (NAMES, NAMES, [0, 1, 2, 3, 4, 4], r"not unique.*\['golf ball', 'moped'\]"),
    (NAMES, NAMES, [0, 1, 2, 3, 4, 6], r"has 6, .*\[0, 6\)"),
    (NAMES, NAMES, [0, 1, 2, 3, 4, -1], r"has -1, .*\[0, 6\)"),
    (NAMES, NAMES, [0, 1, 2, 3, 4, []], r"has \[\], "),
    (NAMES, NAMES, [0, 1, 2, 3, 4, True], "has True, "),
    (NAMES[:3], NAMES, None, "has 3 classes, too few: use a teacher that knows the data's 6"),
]
WITH_HINTS = REFUSED[:11] + REFUSED[14:15]


@pytest.mark.parametrize(("source", "target", "class_map", "message"), REFUSED)
def test_classes_that_do_not_match_are_refused_with_names_and_counts(source, target, class_map, message):
    with pytest.raises(ValueError, match=message):
        between(source, target, class_map)


@pytest.mark.parametrize(("source", "target", "class_map", "message"), WITH_HINTS)
def test_every_hint_works_when_it_is_typed(source, target, class_map, message, tmp_path):
    with pytest.raises(ValueError) as error:
        between(source, target, class_map)
    text = str(error.value)
    if "leave class_map out" in text:
        assert between(source, target).rows
        return
    typed = re.findall(r"--class_map (.*?)\)(?=, |\.$)", text)
    assert typed[-1] == "FILE" and len(typed) > 1 - (len(source) != len(target))
    for command in typed[:-1]:
        (argument,) = shlex.split(command)
        of_command_line = between(source, target, read_class_map(argument))
        shown = argument if argument.startswith("{") else json.dumps(argument)
        assert f"{shown} (--class_map {command})" in text  # the same in Python's form
        assert between(source, target, json.loads(shown)) == of_command_line
        if argument.startswith("{"):
            (tmp_path / "FILE").write_text(argument)
            assert between(source, target, tmp_path / "FILE") == of_command_line
    free = list(range(len(source)))[::-1][: len(target)]
    assert between(source, target, free).rows == free  # "a list of the teacher's indices"
    assert "class_map=" in text


# ---- arithmetic ----


def oracle(logits, members):
    """Probabilities, added and renormalised, in float64."""
    z = logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    parts = np.stack([p[:, list(m)].sum(1) for m in members], axis=1)
    return torch.from_numpy(np.log(parts / parts.sum(1, keepdims=True))), torch.from_numpy(1 - parts.sum(1))


@pytest.mark.parametrize("members", [[[1], [4], [0]], [[5, 0], [2]], [[0, 1, 2], [3], [5, 4]], [[3, 1], [0, 2]]])
@pytest.mark.parametrize("scale", [1, 30])
def test_many_to_one_and_subset_against_float64(members, scale):
    logits = scale * torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    mapping = between(NAMES, [f"d {i}" for i in range(len(members))], members)
    expected, dropped = oracle(logits, members)
    mapped = mapping.apply(logits)
    torch.testing.assert_close(mapped.double().log_softmax(1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mapping.dropped_mass(mapped).double(), dropped, rtol=0, atol=1e-5)
    exact = mapping.apply(logits.double())
    torch.testing.assert_close(exact.log_softmax(1), expected, rtol=1e-12, atol=1e-12)
    everything = sum(map(len, members)) == 6
    assert (mapping.dropped_mass(mapped) == 0).all() if everything else (mapping.dropped_mass(mapped) > 0).any()


def test_a_permutation_gives_out_the_very_same_logits():
    logits = 50 * torch.randn(16, 6)
    order = [4, 2, 0, 5, 1, 3]
    mapping = between(NAMES, [NAMES[i] for i in order])
    assert torch.equal(mapping.apply(logits), logits[:, order])
    assert (mapping.dropped_mass(mapping.apply(logits)) == 0).all()


def test_classes_of_no_probability_stay_finite_or_minus_infinity():
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, 1000.0, 0.0, 0.0]])
    mapped = between(NAMES, ["a", "b", "c"], [[0, 1], [1 + 1], 3]).apply(logits)
    assert mapped.tolist() == [[-1000.0, -torch.inf, 0.0]]


# ---- the rows of a head ----


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (NAMES, NAMES, ([0, 1, 2, 3, 4, 5], 0)),
        (NAMES, NAMES[::-1], ([5, 4, 3, 2, 1, 0], 0)),
        (NAMES, ["Golf ball", "daisy"], ([4, 2], 0)),
        (NAMES, ["daisy", "x", "y", "tabby cat", "moped", "z"], ([2, 1, 3, 0, 5, 4], 3)),
        (NAMES, ["u", "v", "w", "x", "y", "z"], ([0, 1, 2, 3, 4, 5], 6)),
        (["LABEL_0", "LABEL_1"], ["b", "a"], ([0, 1], 0)),
        (["LABEL_0", "LABEL_1"], ["b", "a", "c"], (None, 0)),
        (NAMES, [*NAMES, "x"], (None, 0)),
        (NAMES, ["daisy", "x"], (None, 0)),
    ],
)
def test_known_classes_keep_their_rows(own, names, expected):
    assert head_rows(label_maps(own)["id2label"], names) == expected
