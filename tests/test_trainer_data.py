"""The trainer's data of every kind and its evaluation, in one process on the CPU."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import with_broken
from tiny import tiny
from trainer_helpers import NAMES, config, make_teacher, rows, trainer_for
from transformers import TrainerCallback, ViTImageProcessor

from hf_kd import DistillationTrainer
from hf_kd.data import ImageDataset, cache
from hf_kd.losses import LOSSES
from hf_kd.reporting.collect import make_record

# ---- data of every kind ----


def test_every_kind_of_data_set_gives_the_same_step(tmp_path):
    train = rows(8)
    student, processor = tiny("vit", names=NAMES)

    def normalise(batch):
        return {
            "pixel_values": processor(list(batch["image"]), return_tensors="pt")["pixel_values"],
            "labels": batch["label"],
        }

    class Images(torch.utils.data.Dataset):
        def __init__(self, key):
            self.key = key

        def __len__(self):
            return len(train)

        def __getitem__(self, i):
            image = train[i]["image"]
            if self.key == "pixels":
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return {self.key: image, "label": train[i]["label"]}

    kinds = {
        "rows": train,
        "with_transform": train.with_transform(normalise),
        "pixel_values": train.map(normalise, batched=True, remove_columns=["image", "label"]).with_format("torch"),
        "torch pixels": Images("pixels"),
        "torch image": Images("image"),
        "renamed": train.rename_columns({"image": "img", "label": "fine_label"}),
    }
    losses = {}
    for name, data in kinds.items():
        trainer = trainer_for(
            tmp_path / name, loss="nkd", train=data, evaluation=data, label_column=None, train_image_size=32
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses[name] = [e["loss"] for e in trainer.state.log_history if "loss" in e] + [metrics["eval_kl"]]
    for name, values in losses.items():
        # The teacher's image passes through float, not uint8, where the student's preprocessing had to be inverted.
        assert values == pytest.approx(
            losses["rows"], rel=2e-3 if "pixel_values" in name or "transform" in name else 1e-6
        ), name


def test_undecodable_images_are_skipped_and_counted_up_to_the_cap(tmp_path):
    train = rows(40).cast_column("image", datasets.Image(decode=False))
    broken = train.map(
        lambda row, i: {"image": {"bytes": b"no image", "path": None}} if i == 7 else row, with_indices=True
    )
    broken = broken.cast_column("image", datasets.Image())
    trainer = trainer_for(
        tmp_path, train=broken, evaluation=broken, max_steps=-1, num_train_epochs=2, max_skipped_fraction=0.05
    )
    trainer.train()
    assert len(trainer.skipped) == 1
    metrics = trainer.evaluate()
    assert metrics["eval_skipped"] == 1
    with pytest.raises(ValueError, match="1 of 40 images"):
        trainer_for(
            tmp_path / "cap", train=broken, max_steps=-1, num_train_epochs=1, max_skipped_fraction=0.02
        ).train()


def test_a_batch_of_nothing_but_broken_images_gets_a_stand_in(tmp_path):
    train = rows(12).cast_column("image", datasets.Image(decode=False))
    train = train.map(lambda row, i: {"image": {"bytes": b"", "path": None}} if i == 3 else row, with_indices=True)
    train = train.cast_column("image", datasets.Image())
    trainer = trainer_for(tmp_path, train=train, per_device_train_batch_size=1, max_steps=12, max_skipped_fraction=0.1)
    trainer.train()
    assert trainer.state.global_step == 12 and len(trainer.skipped) == 1


def test_evaluation_on_the_training_images_is_not_augmented(tmp_path):
    data = rows(24)
    trainer = trainer_for(tmp_path, train=data, evaluation=data, augment="resized_crop", teacher_check_batches=1)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]


class Pairs(torch.utils.data.Dataset):
    """What torchvision's datasets give; with `noise`, augmented by draws of its own."""

    def __init__(self, data, noise=False):
        self.data, self.noise = data, noise

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image = torch.from_numpy(np.array(self.data[i]["image"])).permute(2, 0, 1)
        return (image + torch.randint(3, image.shape, dtype=torch.uint8) if self.noise else image), i % 6


def first_batches(trainer, epochs=(0, 1)):
    loader, batches = trainer.get_train_dataloader(), {}
    for epoch in epochs:
        trainer.train_dataset.set_epoch(epoch)
        for batch in loader:
            assert batch["epoch"] == epoch and len(batch["index"]) == len(batch["labels"])
            batches |= {(epoch, int(key)): pixels for key, pixels in zip(batch["index"], batch["pixels"], strict=True)}
    return batches


def test_augmentation_is_the_same_for_every_dataset_of_images(tmp_path):
    data = rows(12)
    images = {
        "rows": data,
        "pairs": Pairs(data),
        "subset": torch.utils.data.Subset(data, range(12)),
        "subset of pairs": torch.utils.data.Subset(Pairs(data), range(12)),
        "with_transform": data.with_transform(lambda batch: {"image": batch["image"], "label": batch["label"]}),
        "subset of ours": torch.utils.data.Subset(ImageDataset(data, "image", "label"), range(12)),
    }
    expected = None
    for name, each in images.items():
        trainer = trainer_for(tmp_path / name, train=each, augment="pad_crop", train_image_size=32)
        assert trainer.augmentation_applied == "pad_crop"
        batches = first_batches(trainer)
        expected = expected or batches
        assert batches.keys() == expected.keys() == {(epoch, key) for epoch in (0, 1) for key in range(12)}
        assert all(torch.equal(batches[key], expected[key]) for key in expected), name
    raw = torch.from_numpy(np.array(data[0]["image"])).permute(2, 0, 1)
    assert not torch.equal(expected[0, 0], raw) and not torch.equal(expected[0, 0], expected[1, 0])
    assert torch.equal(trainer.get_eval_dataloader(images["pairs"]).dataset[0]["pixels"], raw)  # not augmented


def test_the_key_is_that_of_the_whole_split(tmp_path):
    data = rows(12).add_column("__index__", [7 * i for i in range(12)])
    part = data.select([3, 8])
    whole = first_batches(trainer_for(tmp_path, train=data, augment="pad_crop"))
    pairs = part.with_transform(lambda batch: {"image": batch["image"], "label": batch["label"]})
    for number, each in enumerate((part, pairs, torch.utils.data.Subset(data, [3, 8]))):
        batches = first_batches(trainer_for(tmp_path / str(number), train=each, augment="pad_crop"))
        assert batches.keys() == {(0, 21), (0, 56), (1, 21), (1, 56)}
        assert all(torch.equal(batches[key], whole[key]) for key in batches)


def test_what_a_dataset_draws_itself_is_repeated(tmp_path):
    def batches(workers):
        options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        return first_batches(trainer_for(tmp_path, train=Pairs(rows(12), noise=True), augment="none", **options))

    once, again = batches(0), batches(1)
    assert all(torch.equal(again[key], once[key]) for key in once) and not torch.equal(once[0, 3], once[1, 3])


def test_augment_is_refused_where_it_cannot_apply(tmp_path):
    values = rows(6).map(
        lambda batch: {"pixel_values": [np.zeros((3, 32, 32), np.float32)] * len(batch["label"])},
        batched=True,
        remove_columns="image",
    )
    transformed = ImageDataset(rows(6), "image", "label", transform=torch.nn.Identity())
    cases = [(values.with_format("torch"), None), (transformed, None), (Pairs(rows(6)), lambda items: items)]
    reasons = ("under the key image", "a transform of its own", "data_collator")
    cases.append((torch.utils.data.Subset(transformed, [0, 1]), None))
    for (data, collate), reason in zip(cases, (*reasons, reasons[1]), strict=True):
        with pytest.raises(ValueError, match=f"augment='pad_crop' cannot be applied.*{reason}.*augment='none'"):
            trainer_for(tmp_path, train=data, collate=collate, augment="pad_crop")
        for augment in ("", "none"):  # not asked for
            trainer = trainer_for(tmp_path, train=data, collate=collate, augment=augment)
            assert trainer.augmentation_applied is None
    record = make_record(trainer_for(tmp_path, train=rows(6), evaluation=rows(6), augment="flip"))
    assert record["data"]["augmentation"] == "flip"


@pytest.mark.parametrize("augment", ["none", "resized_crop"])
def test_training_images_have_the_proportions_of_the_students_input(augment, tmp_path):
    student = PoolingStudent()
    processor = ViTImageProcessor(size={"height": 64, "width": 32})
    trainer = DistillationTrainer(
        student, config(tmp_path, augment=augment), train_dataset=rows(), processing_class=processor
    )
    assert next(iter(trainer.get_train_dataloader()))["pixels"].shape == (8, 3, 64, 32)
    larger = config(tmp_path, augment=augment, train_image_size=96)
    trainer = DistillationTrainer(student, larger, train_dataset=rows(), processing_class=processor)
    assert next(iter(trainer.get_train_dataloader()))["pixels"].shape == (8, 3, 96, 48)
    trainer.train()
    assert student.seen == {(64, 32)}


class PoolingStudent(torch.nn.Module):
    """A classifier of images of any shape, which it notes."""

    def __init__(self):
        super().__init__()
        self.config = tiny("vit", names=NAMES)[0].config
        self.head, self.seen = torch.nn.Linear(3, len(NAMES)), set()

    def forward(self, pixel_values):
        self.seen.add(tuple(pixel_values.shape[-2:]))
        return self.head(pixel_values.mean((2, 3)))


def test_view_size_is_the_size_of_the_shared_image(tmp_path):
    for augment in ("none", "resized_crop"):
        trainer = trainer_for(tmp_path / augment, train_image_size=16, augment=augment)
        assert next(iter(trainer.get_train_dataloader()))["pixels"].shape == (8, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": rows(6).select([])}, "dataset is empty"),
        ({"train": rows(6).remove_columns("label")}, "image"),
        ({"label_column": "nope"}, "nope"),
        ({"train": rows(6).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))}, "another order"),
        (
            {"train": rows(3).cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))},
            "3 classes, the student 6",
        ),
        ({"train": rows(6).cast_column("label", datasets.Value("string"))}, "class_encode_column"),
        ({"loss": "uskd", "teacher": True}, "uses no teacher"),
        ({"loss": "nkd", "teacher": False}, "learns from a teacher"),
    ],
)
def test_bad_input_is_refused_at_once(change, message, tmp_path):
    student, processor = tiny("vit", names=NAMES)
    change = dict(change)
    teacher = make_teacher() if change.pop("teacher", False) else None
    train = change.pop("train", rows(6))
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            student, config(tmp_path, **change), teacher=teacher, train_dataset=train, processing_class=processor
        )


def test_unknown_settings_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="nkd"):
        config(tmp_path, loss="nkdd")
    with pytest.raises(ValueError, match="gamma"):
        config(tmp_path, loss="nkd", loss_kwargs={"gama": 1.0})
    with pytest.raises(ValueError, match="pad_crop"):
        config(tmp_path, augment="padcrop")


# ---- evaluation ----


def test_evaluation_equals_plain_formulas_and_keeps_no_logits(tmp_path, monkeypatch):
    data = rows(21)
    teacher = make_teacher()
    trainer = trainer_for(tmp_path, loss="nkd", teacher=teacher, evaluation=data)
    kept = []
    original = trainer.gather_function
    trainer.gather_function = lambda x, **kw: (kept.append(x.shape), original(x, **kw))[1]
    metrics = trainer.evaluate()
    student, processor = tiny("vit", names=NAMES)
    pixels = processor(list(data["image"]), return_tensors="pt")["pixel_values"]
    labels = torch.tensor(data["label"])
    with torch.no_grad():
        s = student.eval()(pixels).logits.double()
        t = teacher.model(teacher.processor(list(data["image"]), return_tensors="pt")["pixel_values"]).logits.double()
    expected = {
        "eval_loss": F.cross_entropy(s, labels).item(),
        "eval_top1": (s.argmax(1) == labels).double().mean().item(),
        "eval_top5": (s.topk(5).indices == labels[:, None]).any(1).double().mean().item(),
        "eval_agreement": (s.argmax(1) == t.argmax(1)).double().mean().item(),
        "eval_teacher_top1": (t.argmax(1) == labels).double().mean().item(),
        "eval_kl": F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean").item(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert 0 <= metrics["eval_ece"] <= 1
    assert all(len(shape) == 1 or shape[1] != 6 for shape in kept)


def test_distillation_token_models_are_evaluated(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    names = dict(enumerate(NAMES))
    student = DeiTForImageClassificationWithTeacher(
        DeiTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                   patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    )  # fmt: skip
    processor = tiny("deit", names=NAMES)[1]
    trainer = DistillationTrainer(student, config(tmp_path), eval_dataset=rows(12), processing_class=processor)
    assert {"eval_top1", "eval_loss"} <= trainer.evaluate().keys()


def test_soft_labels_of_mixing_train_and_leave_the_config_alone(tmp_path):
    for loss in LOSSES:
        trainer = trainer_for(tmp_path / loss, loss=loss, mixup_alpha=0.8, cutmix_alpha=1.0)
        trainer.train()
        assert trainer.model.config.problem_type is None


# ---- images that are kept once they are decoded ----


class StopAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == 4  # within an epoch


def test_training_on_kept_images_is_that_on_images_decoded_each_time(tmp_path, monkeypatch):
    settings = {"augment": "pad_crop", "max_steps": 6, "max_skipped_fraction": 0.5, "save_strategy": "steps"}

    def trainer(name):
        data = with_broken(rows(20), 3, 11)  # three steps an epoch
        return trainer_for(tmp_path / name, train=data, evaluation=data, **settings)

    def results(trainer):
        metrics = {key: value for key, value in trainer.evaluate().items() if not key.endswith(("time", "_second"))}
        return metrics, trainer.skipped, trainer.eval_skipped

    with monkeypatch.context() as patch:
        patch.setattr(cache, "MAX_BYTES", 0)
        each = trainer("each")
        each.train()
        assert each.train_dataset._decoded is None
    stopped = trainer("kept")
    stopped.add_callback(StopAt4())
    stopped.train()
    resumed = trainer("kept")
    resumed.train(resume_from_checkpoint=True)
    kept = trainer("whole")
    kept.train()
    assert kept.train_dataset._decoded.known.sum() == 18 and kept.state.global_step == 6
    for other in (kept, resumed):
        assert results(other) == results(each)
        for name, value in each.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name


# ---- what is counted, and images without labels ----


class Truncating(DistillationTrainer):
    """A trainer whose loader leaves images out, as a loader of the user's own may."""

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        return torch.utils.data.DataLoader(loader.dataset, 8, collate_fn=loader.collate_fn, drop_last=True)


def test_images_that_are_not_counted_are_no_metric(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    teacher = make_teacher()
    trainer = Truncating(
        student, config(tmp_path), eval_teacher=teacher, eval_dataset=rows(19), processing_class=processor
    )
    for measure in (trainer.evaluate, trainer.measure_teacher):
        with pytest.raises(ValueError, match="16 of 19 images were counted and 0 could not be decoded"):
            measure()
    unlabelled = [{"image": row["image"], "label": -1 if i < 3 else row["label"]} for i, row in enumerate(rows(8))]
    with pytest.raises(ValueError, match=r"5 of 8 images were counted.*no label"):
        trainer.evaluate(unlabelled)


def test_broken_images_count_nowhere_and_the_record_has_what_was_counted(tmp_path):
    data = with_broken(rows(20), 3, 11)
    trainer = trainer_for(tmp_path, evaluation=data, max_skipped_fraction=0.5)
    trainer.train()
    metrics = trainer.evaluate()
    whole = trainer.evaluate(data.select([i for i in range(20) if i not in (3, 11)]))
    assert metrics["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    assert (metrics["eval_samples"], metrics["eval_skipped"], whole["eval_samples"]) == (18, 2, 18)
    assert make_record(trainer, metrics)["data"]["eval_size"] == 18
    soft = [{"image": row["image"], "label": F.one_hot(torch.tensor(row["label"]), 6).float()} for row in rows(20)]
    for i in (3, 11):
        soft[i]["image"] = b"broken"
    assert trainer.evaluate(soft)["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


def test_predict_scores_images_without_labels(tmp_path):
    data = rows(10)
    trainer = trainer_for(tmp_path, label_column="label", loss="nkd", max_skipped_fraction=0.5)
    expected = trainer.predict(data)
    assert expected.metrics["test_samples"] == 10 and expected.label_ids.tolist() == data["label"]
    images = list(data["image"])
    normalised = trainer.preprocessing(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]))
    kinds = {
        "no column": data.remove_columns("label"),
        "labels of -1": [{"image": image, "label": -1} for image in images],
        "images": images,
        "dicts": [{"image": image} for image in images],
        "normalised": [{"pixel_values": values} for values in normalised],
    }
    for name, unlabelled in kinds.items():
        output = trainer.predict(unlabelled)
        np.testing.assert_allclose(output.predictions, expected.predictions, rtol=1e-4, atol=1e-5, err_msg=name)
        assert not {"test_loss", "test_top1", "test_samples"} & output.metrics.keys(), name
        assert name == "labels of -1" or output.label_ids is None, name
    with pytest.raises(ValueError, match="looking for the label_column"):
        trainer.evaluate(kinds["no column"])
    output = trainer.predict(with_broken(kinds["no column"], 4))
    assert np.isnan(output.predictions).all(1).tolist() == [i == 4 for i in range(10)]
    assert output.metrics["test_skipped"] == 1 and len(trainer.eval_skipped) == 1
