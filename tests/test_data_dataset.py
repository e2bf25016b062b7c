"""Decoding against Pillow, transforms against their definitions, and mixing."""

import io
import pickle
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import scipy.stats
import torch
from data_helpers import alone as alone
from data_helpers import encode, photo
from data_helpers import pytestmark as pytestmark
from torchvision.transforms import v2

from hf_kd.data import (
    AUGMENTS,
    ImageDataset,
    Mixer,
    UndecodableImage,
    build_transform,
    decode_rgb,
)
from hf_kd.data.decode import _jpeg_size
from hf_kd.data.transforms import sample_draws

ORIENTATION = 0x112


def by_pillow(data):
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    with warnings.catch_warnings(action="ignore"):  # of palettes with transparency
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def oriented(value, motorola=False):
    """An EXIF block of one tag; PIL writes little-endian ones only."""
    if motorola:
        return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", ORIENTATION, 3, 1, value, 0) + b"\0\0\0\0"
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def files():
    rgb, rgba = PIL.Image.fromarray(photo()), PIL.Image.fromarray(photo(channels=4), "RGBA")
    grey, palette = rgb.convert("L"), rgb.quantize(64)
    cmyk = PIL.Image.fromarray(photo(channels=4), "CMYK")
    for name, image in {"RGB": rgb, "RGBA": rgba, "L": grey, "LA": rgba.convert("LA"), "P": palette}.items():
        yield f"{name} png", encode(image)
    yield "1 png", encode(rgb.convert("1"))
    yield "P transparent index png", encode(palette, transparency=3)
    yield "P transparent table png", encode(palette, transparency=bytes(range(64)))
    yield "L transparent png", encode(grey, transparency=100)
    for name, image in {"RGB": rgb, "L": grey, "CMYK": cmyk, "YCbCr": rgb.convert("YCbCr")}.items():
        yield f"{name} jpeg", encode(image, "JPEG", quality=90)
    yield "progressive jpeg", encode(rgb, "JPEG", progressive=True)
    inverted = encode(cmyk, "JPEG", quality=90)
    adobe = inverted.index(b"\xff\xee")
    end = adobe + 2 + int.from_bytes(inverted[adobe + 2 : adobe + 4], "big")
    yield "CMYK without Adobe's mark jpeg", inverted[:adobe] + inverted[end:]
    yield "YCCK jpeg", inverted[: end - 1] + b"\x02" + inverted[end:]
    yield "RGB webp", encode(rgb, "WEBP")
    yield "lossless webp", encode(rgb, "WEBP", lossless=True)
    yield "RGBA webp", encode(rgba, "WEBP")
    yield "gif", encode(palette, "GIF")
    yield "bmp", encode(rgb, "BMP")
    yield "tiff", encode(rgb, "TIFF")
    frames = [PIL.Image.fromarray(photo(seed=i)) for i in range(3)]
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"animated {kind}", encode(frames[0], kind, save_all=True, append_images=frames[1:])
    for kind in ("JPEG", "PNG", "WEBP"):
        for value in range(1, 9):
            yield f"orientation {value} {kind}", encode(rgb, kind, exif=oriented(value))
        yield f"orientation, big-endian {kind}", encode(rgb, kind, exif=oriented(6, motorola=True))
    yield "orientation CMYK jpeg", encode(cmyk, "JPEG", exif=oriented(8))
    xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    yield "orientation in XMP jpeg", encode(rgb, "JPEG", xmp=xmp.encode())
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    yield "orientation in XMP png", encode(rgb, pnginfo=info)
    data = encode(rgb)
    yield "orientation behind the pixels png", data[:-12] + png_chunk(b"eXIf", oriented(6)[6:]) + data[-12:]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in files()])
def test_decode_equals_pillow(data):
    pixels, expected = decode_rgb(data), by_pillow(data)
    assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape
    assert (pixels.int() - expected.int()).abs().max() <= 2  # two builds of libjpeg may round differently


def test_orientation_is_applied_to_the_right_side():
    rgb = np.zeros((8, 16, 3), np.uint8)
    rgb[:, :8] = 255  # bright on the left; orientation 6 turns it clockwise: bright on top
    pixels = decode_rgb(encode(rgb, "JPEG", exif=oriented(6)))
    assert pixels.shape == (3, 16, 8) and pixels[:, :6].min() > 200 and pixels[:, 10:].max() < 50


@pytest.mark.parametrize("widen", [256, 257])
def test_16_bit_greys_are_scaled(widen):
    grey = photo()[..., 0]
    wide = grey.astype(np.uint16) * np.uint16(widen)
    for source in (wide, PIL.Image.fromarray(wide), encode(wide), encode(wide, "TIFF")):
        assert torch.equal(decode_rgb(source), torch.from_numpy(grey).expand(3, -1, -1))


def test_16_bit_colours_are_scaled():
    small = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in small)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert torch.equal(decode_rgb(data), torch.from_numpy(small).permute(2, 0, 1))


@pytest.mark.filterwarnings("error::UserWarning")
def test_decode_takes_every_kind_of_source(tmp_path):
    rgb = photo()
    data = encode(rgb)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    turned = PIL.Image.open(io.BytesIO(encode(rgb, "PNG", exif=oriented(3))))
    sources = [data, bytearray(data), {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    sources += [path, str(path), path.as_uri(), PIL.Image.fromarray(rgb), rgb, pixels, rgb[:, ::-1][:, ::-1]]
    sources += [np.dstack([rgb, rgb[..., :1]]), torch.cat([pixels, pixels[:1]])]
    for source in sources:
        assert torch.equal(decode_rgb(source), pixels), type(source)
    assert torch.equal(decode_rgb(turned), pixels.flip(1, 2))
    palette = PIL.Image.open(io.BytesIO(encode(PIL.Image.fromarray(rgb).quantize(9), transparency=bytes(range(9)))))
    assert torch.equal(decode_rgb(palette), by_pillow(encode(palette)))
    for source in (rgb[..., 0], rgb[..., :1], pixels[:1]):
        assert torch.equal(decode_rgb(source), pixels[:1].expand(3, -1, -1))


def test_decode_once_torchvision_has_no_decoders(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo(), kind)
        assert torch.equal(decode_rgb(data), by_pillow(data))


def test_the_header_of_a_jpeg_gives_the_size_that_pillow_gives():
    rgb = PIL.Image.fromarray(photo(37, 53))
    kinds = [{}, {"progressive": True}, {"comment": b"\xff\xc0 in a comment"}, {"restart_marker_rows": 1}]
    kinds += [{"exif": oriented(6), "icc_profile": bytes(70_000)}, {"quality": 100, "subsampling": 0}]
    for options in kinds:
        data = encode(rgb, "JPEG", **options)
        assert _jpeg_size(data) == PIL.Image.open(io.BytesIO(data)).size == (53, 37)
        pixels = data.index(b"\xff\xda")
        assert not any(map(_jpeg_size, (data[:length] for length in range(pixels))))
        frame = data.rindex(b"\xff\xc2" if "progressive" in options else b"\xff\xc0", 0, pixels)
        for marker in (b"\xff\x01", b"\xff\xd0", b"\xff\xff", data[frame:pixels]):  # none usual there: ask Pillow
            assert _jpeg_size(data[:frame] + marker + data[frame:]) is None
    # Two 0xFF are a filling and a marker, of whose bytes none is a length; beyond that another size could be read.
    assert _jpeg_size(b"\xff\xd8\xff\xff\xe0" + bytes(0xE002 - 3) + data[frame:]) is None


def test_undecodable():
    rgb = photo(64, 64)
    sources = [encode(rgb, kind)[:cut] for kind in ("JPEG", "PNG", "WEBP") for cut in (0, 3, 30, 200, -300)]
    sources += [encode(rgb, "JPEG")[:-2], b"<html>", None, {"bytes": None, "path": None}, "/nowhere/a.png", [1, 2]]
    sources += [torch.full((3, 4, 4), 2.0), torch.zeros(2, 4, 4, dtype=torch.uint8), np.zeros((4, 4), np.float32)]
    for source in sources:
        with pytest.raises(UndecodableImage, match="."):
            decode_rgb(source)
    with pytest.raises(UndecodableImage, match="truncated"):
        decode_rgb(encode(rgb, "JPEG")[:-100])
    with pytest.raises(UndecodableImage, match="/nowhere/a.png"):
        decode_rgb({"bytes": None, "path": "/nowhere/a.png"})


# ---- transforms


def test_transforms_give_uint8_of_the_promised_size():
    image = decode_rgb(photo(40, 60))
    for name in AUGMENTS:
        transform = pickle.loads(pickle.dumps(build_transform(name, 24)))
        for _ in range(10):
            result = transform(image)
            assert result.dtype == torch.uint8
            assert result.shape == ((3, 24, 24) if name in ("resized_crop", "deit") else (3, 40, 60))
    assert torch.equal(build_transform("none")(image), image)
    with pytest.raises(ValueError, match="pad_crop"):
        build_transform("crop")
    for name in ("resized_crop", "deit"):
        with pytest.raises(ValueError, match="size"):
            build_transform(name)


def test_pad_crop_is_a_crop_of_the_padded_image():
    image = torch.randint(1, 256, (3, 32, 48), dtype=torch.uint8)
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (6, 6)))
    crops = {
        padded[:, y : y + 32, x : x + 48][..., ::step].tobytes(): (y, x, step)
        for y in range(9)
        for x in range(13)
        for step in (1, -1)
    }
    transform = build_transform("pad_crop")
    seen = [crops[transform(image).numpy().tobytes()] for _ in range(2000)]  # KeyError: not such a crop
    assert {y for y, _, _ in seen} == set(range(9)) and {x for _, x, _ in seen} == set(range(13))
    assert 0.4 < np.mean([step == 1 for _, _, step in seen]) < 0.6


def test_flip():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    flips = [torch.equal(build_transform("flip")(image), image.flip(2)) for _ in range(400)]
    assert 0.4 < np.mean(flips) < 0.6


@pytest.mark.parametrize(("augment", "crop", "flip"), [("none", 0, 0), ("flip", 0, 1), ("pad_crop", 1, 1)])
def test_a_batch_is_augmented_by_the_draws_of_each_image(augment, crop, flip):
    images, draws = (
        np.stack([photo(24, 40, seed=i) for i in range(64)]).transpose(0, 3, 1, 2),
        sample_draws(3, 5, range(64)),
    )
    result = build_transform(augment).batch(images, draws)
    assert result.dtype == np.uint8 and draws.max() < 2**32
    for image, draw, augmented in zip(images, draws.tolist(), result, strict=True):
        top, left = (7 * draw[0] // 2**32, 11 * draw[1] // 2**32) if crop else (3, 5)
        expected = np.pad(image, ((0, 0), (3, 3), (5, 5)))[:, top : top + 24, left : left + 40]
        assert np.array_equal(augmented, expected[..., ::-1] if flip and draw[2] < 2**31 else expected)


def splitmix64(state):
    """The generator as its paper writes it, in Python's integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def test_draws_are_those_of_splitmix64():
    assert next(splitmix64(1234567)) == 6457827717110365317  # published
    generator = splitmix64(int(np.random.SeedSequence((7, 2)).generate_state(1, np.uint64)[0]))
    expected = np.array([[next(generator) >> 32 for _ in range(3)] for _ in range(100)])
    assert np.array_equal(sample_draws(7, 2, range(100)), expected)
    assert np.array_equal(sample_draws(7, 2, [99, 3]), expected[[99, 3]])  # whatever the batch is


def test_draws_are_uniform_and_independent_over_keys_epochs_and_seeds():
    keys, n = np.arange(20_000), 20_000
    draws = {(seed, epoch): sample_draws(seed, epoch, keys) / 2**32 for seed in (0, 1, 42) for epoch in (0, 1, 2)}
    columns = [x for numbers in draws.values() for x in numbers.T]
    for x in columns:
        for bins in (2, 9, 57):  # flips, and offsets at 32 and 224 px
            counts = np.bincount((x * bins).astype(int), minlength=bins)
            chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()
            assert abs(chi2 - (bins - 1)) < 5 * np.sqrt(2 * bins)
        for lag in (1, 2, 3, 128):  # neighbours in the dataset, and in the next batch
            assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 5 / np.sqrt(n)
    between = np.corrcoef(columns) - np.eye(len(columns))  # offsets and flip, epochs, seeds
    assert np.abs(between).max() < 5 / np.sqrt(n)
    high = np.corrcoef([x * 2**20 % 1 for x in columns]) - np.eye(len(columns))  # the low bits
    assert np.abs(high).max() < 5 / np.sqrt(n)


@pytest.mark.parametrize("size", [24, (30, 20)])
@pytest.mark.parametrize("shape", [(60, 80), (90, 40), (12, 120), (120, 12)])
def test_resized_crop_draws_the_parts_that_torchvision_does(size, shape):
    """Down to the parts in the middle of images that are too narrow for any other."""
    height, width = (size, size) if isinstance(size, int) else size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)
    crop, image = v2.RandomResizedCrop(size, ratio=ratio), torch.empty(3, *shape)
    random.seed(0)
    ours = np.array([build_transform("resized_crop", size).draw(*shape) for _ in range(2000)])
    params = [crop.make_params([image]) for _ in range(2000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    for measure in (
        *(lambda parts, i=i: parts[:, i] for i in range(4)),
        lambda parts: parts[:, 2] * parts[:, 3],
        lambda parts: parts[:, 3] / parts[:, 2],
    ):
        assert scipy.stats.ks_2samp(measure(ours), measure(theirs), method="asymp").pvalue > 1e-3
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= shape).all()


def test_resized_crop_is_the_resized_part_of_torchvision():
    transform, flips = build_transform("resized_crop", (24, 30)), 0
    decoded = decode_rgb(encode(photo(60, 80), "JPEG"))
    for image in (decoded, decoded.contiguous(), decoded[:, ::2, 1:]):  # however it lies in memory
        for seed in range(40):
            random.seed(seed)
            part = transform.draw(*image.shape[1:])
            expected = v2.functional.resized_crop(image, *part, [24, 30], v2.InterpolationMode.BICUBIC, antialias=True)
            random.seed(seed)
            result = transform(image)
            flipped = torch.equal(result, expected.flip(2))
            assert flipped or torch.equal(result, expected)
            flips += flipped
    assert 40 < flips < 80


def test_deit_survives_its_strongest_levels():
    """About one image in a thousand draws a posterisation to 0 bits, which current Pillow refuses."""
    transform = build_transform("deit", 16).transforms[2]
    image = PIL.Image.fromarray(photo(16, 16))
    posterise = next(op for op in transform.ops if op.name.startswith("Posterize"))
    posterise.prob, posterise.magnitude, posterise.magnitude_std = 1.0, 10, 0
    assert not np.array(posterise(image)).any()
    posterise.magnitude = 0
    assert np.array(posterise(image)).any()


def test_deit_resamples_with_one_filter():
    operations = build_transform("deit", 16).transforms[2].ops
    assert {operation.kwargs["resample"] for operation in operations} == {PIL.Image.Resampling.BICUBIC}


def test_deit_erases_a_quarter_with_noise_of_the_imagenet_statistics():
    transform = build_transform("deit", 64).transforms[-1]
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    erased = [result[:, result.amax(0) > 0] for result in (transform(image) for _ in range(600)) if result.any()]
    assert 0.19 < len(erased) / 600 < 0.31
    values = torch.cat(erased, dim=1).double()
    rng = np.random.default_rng(0)
    for channel, mean, std in zip(values, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True):
        expected = (rng.normal(mean, std, 200_000) * 255).clip(0, 255)
        assert channel.mean() == pytest.approx(expected.mean(), abs=1)
        assert channel.std() == pytest.approx(expected.std(), abs=1)


# ---- mixing


def mixing_batch():
    pixels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    pixels += (torch.arange(8, dtype=torch.uint8) * 30).view(8, 1, 1, 1)
    return pixels, torch.arange(8)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixer_labels_are_the_shares_of_the_pixels(alphas):
    """Image i is constant with value 30 i, so the mean of a mixed one must be that of its labels."""
    pixels, labels = mixing_batch()
    mixer, kinds = Mixer(10, *alphas), []
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, soft = mixer(pixels, labels)
        assert mixed.dtype == soft.dtype == torch.float32 and soft.shape == (8, 10)
        assert torch.allclose(soft.sum(1), torch.ones(8)) and soft[:, 8:].sum() == 0
        assert (soft > 0).sum(1).max() <= 2
        expected = soft.double() @ (torch.arange(10).double() * 30 / 255)
        assert torch.allclose(mixed.double().mean((1, 2, 3)), expected, atol=1e-5)
        kinds.append("mixup" if torch.equal(mixed[3], mixed[3, 0, 0, 0].expand(3, 16, 16)) else "cutmix")
    share = np.mean([kind == "mixup" for kind in kinds])
    # A cut of no or of all pixels leaves a constant image, too, hence not exactly 0 or a half.
    assert {(0.8, 0.0): share == 1, (0.0, 1.0): share < 0.2, (0.8, 1.0): 0.4 < share < 0.7}[alphas]


def test_mixer_repeats_with_the_seed_and_keeps_its_inputs():
    pixels, labels = mixing_batch()
    mixer, before = Mixer(8, 0.8, 1.0), pixels.clone()
    torch.manual_seed(3)
    first = mixer(pixels, labels)
    torch.manual_seed(3)
    second = mixer(pixels, torch.nn.functional.one_hot(labels, 8).float())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and torch.equal(pixels, before)
    for alphas in ((0, 0), (-1, 1)):
        with pytest.raises(ValueError, match="mixup_alpha"):
            Mixer(8, *alphas)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind):
    data = encode(np.zeros((40, 50, 3), np.uint8), kind)
    assert decode_rgb(data, max_pixels=2000).shape == (3, 40, 50)
    with pytest.raises(UndecodableImage, match="50 × 40 pixels are more than max_image_pixels=1999"):
        decode_rgb(data, max_pixels=1999)


def test_a_small_file_of_many_pixels_costs_nothing():
    """Its header says 30,000 × 30,000; nothing that long is ever allocated, and Pillow's own limit stays."""
    data = bytearray(encode(np.zeros((8, 8, 3), np.uint8), "PNG"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    dataset = ImageDataset([{"image": bytes(data), "label": 0}])
    before = PIL.Image.MAX_IMAGE_PIXELS
    assert dataset[0]["skipped"].endswith("30000 × 30000 pixels are more than max_image_pixels=178956970")
    assert PIL.Image.MAX_IMAGE_PIXELS == before
