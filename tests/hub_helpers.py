"""What the tests of pushing and of loading share: a local Hub, a tiny trainer, and what a fault is told as."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from local_hub import LocalHub
from PIL import Image

from hf_kd import DistillationConfig, DistillationTrainer
from hf_kd.hub import user_message

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]
ANNA = "hf_" + "a" * 34


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LocalHub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        for module in ("utils._http", "file_download"):  # between its tries the client waits
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))
        hub.add_token(ANNA, user="anna", orgs={"lab": "write", "school": "read"})
        yield hub


def image(height=50, width=70):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def trainer_for(student, processor, folder, **settings):
    pixels = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [{"pixels": x, "labels": i % 6} for i, x in enumerate(pixels)]
    settings = {"loss": "uskd", "max_steps": 1, "save_strategy": "no"} | settings
    args = DistillationConfig(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    return DistillationTrainer(student, args, train_dataset=images, eval_dataset=images, processing_class=processor)


def logits(model, values):
    with torch.no_grad():
        output = model.eval()(values)
    return getattr(output, "logits", output)


def told(call, *args, **kwargs):
    """What `user_message` says of the error that a call ends with."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    message = user_message(caught.value)
    assert message is not None, caught.value
    assert "\n" not in message and "Traceback" not in message
    return message
