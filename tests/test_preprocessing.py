"""`Preprocessing` against the image processors themselves."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    SegformerImageProcessor,
    TextNetImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_kd import Preprocessing
from hf_kd.data import build_transform

SQUARE = {"height": 32, "width": 32}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "vit_pil": lambda: ViTImageProcessorPil(size={"height": 40, "width": 24}, resample=3),
    "deit": lambda: DeiTImageProcessor(size={"height": 37, "width": 37}, crop_size=SQUARE),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "bit": lambda: BitImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "efficientnet": lambda: EfficientNetImageProcessor(
        size=SQUARE, include_top=True, rescale_offset=True, rescale_factor=1 / 127.5, image_std=[0.3, 0.4, 0.5]
    ),
    "segformer": lambda: SegformerImageProcessor(size=SQUARE),
    "mobilevit": lambda: MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "timm": lambda: TimmWrapperImageProcessor(
        pretrained_cfg={"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.9, **IMAGENET}
    ),
    "timm_squash": lambda: TimmWrapperImageProcessor(
        pretrained_cfg={"input_size": (3, 32, 48), "interpolation": "bilinear", "crop_mode": "squash", **IMAGENET}
    ),
}
SHAPES = [(61, 83), (33, 32), (100, 37), (32, 32), (25, 29)]


def make_image(height, width, seed=0):
    """Colour gradients with noise: every resampling filter and every shift of a crop gives something else."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (height + width)], axis=2)
    return Image.fromarray((0.6 * smooth + 0.4 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8))


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def own(processor, images):
    return torch.as_tensor(processor(images=images, return_tensors="pt")["pixel_values"])


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def test_a_view_gives_the_processors_own_pixel_values(processor):
    preprocessing = Preprocessing(processor)
    for i, shape in enumerate(SHAPES):
        image = make_image(*shape, seed=i)
        expected = own(processor, [image])
        assert expected.shape[-2:] == preprocessing.size
        for pixels in (tensor(image), tensor(image).float() / 255):  # bytes, and floats in [0, 1]
            values = preprocessing(pixels[None])
            assert values.dtype is torch.float32
            torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)


def test_frames_of_images_of_many_sizes_are_what_the_processor_shows_the_model(processor):
    preprocessing = Preprocessing(processor)
    images = [make_image(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    expected = torch.cat([own(processor, [image]) for image in images])
    frames = preprocessing.resize_and_crop([tensor(image) for image in images])
    assert frames.dtype is torch.uint8 and frames.shape == expected.shape
    torch.testing.assert_close(preprocessing(frames, cropped=True), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(preprocessing(frames.float() / 255, cropped=True), expected, rtol=0, atol=2e-5)


def test_denormalize_undoes_the_preprocessing(processor):
    preprocessing = Preprocessing(processor)
    pixels = tensor(make_image(*preprocessing.size))[None]
    torch.testing.assert_close(
        preprocessing.denormalize(preprocessing(pixels, cropped=True)), pixels.float() / 255, rtol=0, atol=1e-5
    )
    assert (
        preprocessing.denormalize(torch.full((1, 3, 4, 4), 1e3)).max() <= 1
        and preprocessing.denormalize(torch.full((1, 3, 4, 4), -1e3)).min() >= 0
    )


def test_the_statistics_are_the_configured_ones():
    mean, std = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]
    preprocessing = Preprocessing(ViTImageProcessor(size=SQUARE, image_mean=mean, image_std=std))
    pixels = tensor(make_image(32, 32))
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(preprocessing(pixels[None], cropped=True)[0].double(), expected, rtol=0, atol=1e-5)
    assert preprocessing.size == (32, 32) and preprocessing.channels == [0, 1, 2]
    assert "mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7]" in repr(preprocessing)


def test_channels_that_a_processor_swaps_are_swapped_in_training_images_too():
    """MobileViT sees BGR: a preprocessing from grey images alone would train it on RGB and evaluate it on BGR."""
    preprocessing = Preprocessing(MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE))
    red = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    values = preprocessing(red, cropped=True)
    assert preprocessing.channels == [2, 1, 0]
    assert (values[0, 2] == 1).all() and (values[0, :2] == 0).all()


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_framed_image_is_resized_whole(mode, floats):
    """Nothing is cropped, though the processor crops: torch's own interpolation of the whole image is the oracle."""
    processor = BitImageProcessor(
        size={"shortest_edge": 64}, crop_size=SQUARE, resample={"bilinear": 2, "bicubic": 3}[mode]
    )
    preprocessing = Preprocessing(processor)
    pixels = tensor(make_image(90, 90))[None]
    whole = F.interpolate(pixels.float(), (32, 32), mode=mode, antialias=True, align_corners=False).clamp(0, 255) / 255
    shown = preprocessing.denormalize(preprocessing(pixels.float() / 255 if floats else pixels, cropped=True))
    torch.testing.assert_close(shown, whole, rtol=0, atol=1e-5 if floats else 1.01 / 255)
    assert (
        preprocessing.denormalize(preprocessing(pixels)) - whole
    ).abs().max() > 0.1  # the evaluation frame is another one


RECTANGLES = [(64, 32), (32, 64), (48, 36)]


def coordinates(height, width):
    """An image of 200 px squares: red is the row and green the column, in steps of one."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, 0 * rows]).to(torch.uint8)


def steps(pixels):
    """How many rows and columns of the original there are between neighbours, from the middle of the image."""
    values = pixels.float()
    return values[0].diff(dim=0).mean().abs().item(), values[1].diff(dim=1).mean().abs().item()


@pytest.mark.parametrize("size", RECTANGLES)
@pytest.mark.parametrize("augment", ["resized_crop", "deit"])
def test_random_crops_for_a_rectangular_input_are_not_squashed(augment, size):
    """Random crops are of 3/4 to 4/3 the model's proportions, as for a square input those of a square."""
    processor = ViTImageProcessor(size=dict(zip(("height", "width"), size, strict=True)))
    shape = Preprocessing(processor).training_shape(96)
    assert max(shape) == 96 and shape[0] * size[1] == shape[1] * size[0]
    transform = build_transform(augment, shape)
    crop = transform.transforms[0] if augment == "deit" else transform
    random.seed(0)
    crops = [crop(coordinates(200, 200)) for _ in range(20)]
    assert {image.shape[1:] for image in crops} == {shape}
    ratios = [rows / columns for rows, columns in map(steps, crops)]
    assert 0.7 < min(ratios) < 0.95 and 1.05 < max(ratios) < 1.4


@pytest.mark.parametrize("size", RECTANGLES)
def test_an_image_of_other_proportions_is_cut_not_squashed(size, monkeypatch):
    """As a teacher with a rectangular input is shown the crops of a square student."""
    warned = []
    monkeypatch.setattr("hf_kd.models.preprocessing.logger.warning_once", warned.append)
    processor = ViTImageProcessor(size=dict(zip(("height", "width"), size, strict=True)))
    preprocessing, pixels = Preprocessing(processor), coordinates(96, 96)[None]
    shown = preprocessing.denormalize(preprocessing(pixels, cropped=True))[0] * 255
    rows, columns = steps(shown)
    assert rows == pytest.approx(columns, rel=0.03) and rows == pytest.approx(96 / max(size), rel=0.03)
    assert shown[0].mean() == pytest.approx(47.5, abs=0.5) and shown[1].mean() == pytest.approx(47.5, abs=0.5)
    assert len(warned) == 1 and "96 × 96" in warned[0]
    preprocessing(torch.zeros(1, 3, 97, round(97 * size[1] / size[0])), cropped=True)  # but for rounding the same
    assert len(warned) == 1


def test_floats_stay_in_range_where_bicubic_overshoots():
    preprocessing = Preprocessing(
        ViTImageProcessor(size=SQUARE, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )
    edge = torch.zeros(1, 3, 20, 20)
    edge[..., 10:] = 1
    assert preprocessing(edge, cropped=True).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(
        preprocessing(edge, cropped=True), preprocessing((edge * 255).byte(), cropped=True), rtol=0, atol=0.01
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: ViTImageProcessor(size={"height": 24, "width": 24}),
        lambda: ViTImageProcessor(size=SQUARE, image_mean=[0.4] * 3),
        lambda: ViTImageProcessor(size=SQUARE, resample=3),
        lambda: DeiTImageProcessor(size=SQUARE, crop_size=SQUARE, resample=2),
        lambda: MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    ],
)
def test_views_are_equal_if_they_show_the_same(other):
    assert Preprocessing(ViTImageProcessor(size=SQUARE)) == Preprocessing(ViTImageProcessor(size=SQUARE))
    assert Preprocessing(ViTImageProcessor(size=SQUARE)) != Preprocessing(other())


class Distorting:
    """A processor of 8 px that is no affine map of each channel."""

    def __init__(self, change):
        self.change = change

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.stack([self.change(i.float() / 255)[:, :8, :8] for i in images])}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False), r"fixed size"),
        (TextNetImageProcessor(), r"\(3, 640, 1024\)"),
        (ViTImageProcessor(do_resize=False), r"\(3, 200, 320\)"),
        (Distorting(lambda x: x**1.2), "not an affine map"),
        (Distorting(lambda x: x.mean(0, keepdim=True).expand(3, -1, -1)), "not an affine map"),
        (Distorting(lambda x: x * 0 + 1), "not an affine map"),
        (Distorting(lambda x: x[:1]), r"\(1, 8, 8\)"),
    ],
)
def test_a_processor_that_is_no_view_is_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(processor)
