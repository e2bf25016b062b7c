"""A batch of one image, in which a batch norm has one value per channel."""

import pytest
from data_helpers import with_broken
from trainer_helpers import config, freeze_batch_norm, rows, trainer_for


def test_a_last_batch_of_one_image_is_refused_where_batch_norm_gets_one_value(tmp_path):
    settings = {"train": rows(25), "per_device_train_batch_size": 6, "max_steps": 6}
    trainer = trainer_for(tmp_path, "resnet", **settings)
    where = r"25 images in batches of 6 give a batch of one image, and batch norm in resnet\.encoder\.stages\.3\."
    with pytest.raises(
        ValueError, match=where + ".*set dataloader_drop_last=True.*another per_device_train_batch_size"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="statistics: set another per_device_train_batch_size"):
        trainer_for(tmp_path, "resnet", **settings | {"per_device_train_batch_size": 1}).train()
    trainer_for(tmp_path, "resnet", dataloader_drop_last=True, **settings).train()
    trainer_for(tmp_path, "resnet", **settings | {"max_steps": 4}).train()  # ends before
    trainer_for(tmp_path, "vit", **settings).train()  # has no batch norm
    frozen = trainer_for(tmp_path, "resnet", **settings)
    freeze_batch_norm(frozen.model)
    frozen.train()


def test_a_batch_that_broken_images_leave_with_one_is_named(tmp_path):
    data = with_broken(rows(8), *range(7))
    trainer = trainer_for(tmp_path, "resnet", train=data, max_skipped_fraction=1.0)
    with pytest.raises(ValueError, match="batch of one image.*per_device_train_batch_size"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_length_is_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"train_sampling_strategy='{strategy}'.*random or sequential"):
        config(tmp_path, train_sampling_strategy=strategy)
    trainer_for(tmp_path, train_sampling_strategy="sequential").train()
