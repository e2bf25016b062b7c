"""What the tests of loading and of the auxiliary head share: an image, logits, and what transformers reopens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

NAMES = ["tabby cat", "fire truck", "daisy"]


def image(height=41, width=57, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def logits(model, values):
    with torch.no_grad():
        return model.eval()(values).logits


def check_reopens(model, processor, folder, names):
    """What transformers alone makes of the folder: the same logits for an image, and the class names."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    values = torch.as_tensor(processor(images=[image()], return_tensors="pt")["pixel_values"])
    again, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    values_again = AutoImageProcessor.from_pretrained(folder)(images=[image()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(values_again), values)
    expected = logits(model, values)
    torch.testing.assert_close(logits(again, values), expected)
    assert again.config.id2label == dict(enumerate(names))
    answer = pipeline("image-classification", model=str(folder))(image(), top_k=len(names))
    probabilities = dict(zip(names, expected.softmax(1)[0].tolist(), strict=True))
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(probabilities, abs=1e-4)
