"""Decoding against Pillow, transforms against their definitions, batches, columns, and loading of local data."""

import io
import logging
import pickle
import random
import struct
import sys
import warnings
import zlib

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from hf_kd.data import (
    AUGMENTS,
    Mixer,
    PictureCollator,
    PictureDataset,
    UndecodableImage,
    build_transform,
    class_names,
    decode_rgb,
    find_columns,
    load_data,
    loading,
)
from hf_kd.data.columns import encode_labels

# torchvision 0.29 announces the end of its decoders at each call; decode_rgb goes to Pillow where they fail.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

ORIENTATION = 0x112


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """The same draws in every run; nothing that load_data converts stays behind, and nothing is asked of the Hub."""
    torch.manual_seed(0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def photo(height=37, width=53, channels=3, seed=0):
    """A smooth picture, which JPEG keeps well, without any symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    planes = [PIL.Image.fromarray(coarse[..., c]).resize((width, height), 3) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def encode(picture, kind="PNG", **options):
    if not isinstance(picture, PIL.Image.Image):
        picture = PIL.Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data):
    picture = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    with warnings.catch_warnings(action="ignore"):  # of palettes with transparency
        picture = picture.convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


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
    for name, picture in {"RGB": rgb, "RGBA": rgba, "L": grey, "LA": rgba.convert("LA"), "P": palette}.items():
        yield f"{name} png", encode(picture)
    yield "1 png", encode(rgb.convert("1"))
    yield "P transparent index png", encode(palette, transparency=3)
    yield "P transparent table png", encode(palette, transparency=bytes(range(64)))
    yield "L transparent png", encode(grey, transparency=100)
    for name, picture in {"RGB": rgb, "L": grey, "CMYK": cmyk, "YCbCr": rgb.convert("YCbCr")}.items():
        yield f"{name} jpeg", encode(picture, "JPEG", quality=90)
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
    picture = decode_rgb(photo(40, 60))
    for name in AUGMENTS:
        transform = pickle.loads(pickle.dumps(build_transform(name, 24)))
        for _ in range(10):
            result = transform(picture)
            assert result.dtype == torch.uint8
            assert result.shape == ((3, 24, 24) if name in ("resized_crop", "deit") else (3, 40, 60))
    assert torch.equal(build_transform("none")(picture), picture)
    with pytest.raises(ValueError, match="pad_crop"):
        build_transform("crop")
    for name in ("resized_crop", "deit"):
        with pytest.raises(ValueError, match="size"):
            build_transform(name)


def test_pad_crop_is_a_crop_of_the_padded_picture():
    picture = torch.randint(1, 256, (3, 32, 48), dtype=torch.uint8)
    padded = np.pad(picture.numpy(), ((0, 0), (4, 4), (6, 6)))
    crops = {
        padded[:, y : y + 32, x : x + 48][..., ::step].tobytes(): (y, x, step)
        for y in range(9)
        for x in range(13)
        for step in (1, -1)
    }
    transform = build_transform("pad_crop")
    seen = [crops[transform(picture).numpy().tobytes()] for _ in range(2000)]  # KeyError: not such a crop
    assert {y for y, _, _ in seen} == set(range(9)) and {x for _, x, _ in seen} == set(range(13))
    assert 0.4 < np.mean([step == 1 for _, _, step in seen]) < 0.6


def test_flip():
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    flips = [torch.equal(build_transform("flip")(picture), picture.flip(2)) for _ in range(400)]
    assert 0.4 < np.mean(flips) < 0.6


def test_deit_survives_its_strongest_levels():
    """About one picture in a thousand draws a posterisation to 0 bits, which current Pillow refuses."""
    transform = build_transform("deit", 16).transforms[3]
    picture = PIL.Image.fromarray(photo(16, 16))
    posterise = next(op for op in transform.ops if op.name.startswith("Posterize"))
    posterise.prob, posterise.magnitude, posterise.magnitude_std = 1.0, 10, 0
    assert not np.array(posterise(picture)).any()
    posterise.magnitude = 0
    assert np.array(posterise(picture)).any()


def test_deit_erases_a_quarter_with_noise_of_the_imagenet_statistics():
    transform = build_transform("deit", 64).transforms[-1]
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    erased = [result[:, result.amax(0) > 0] for result in (transform(picture) for _ in range(600)) if result.any()]
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
    """Picture i is constant with value 30 i, so the mean of a mixed one must be that of its labels."""
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
    # A cut of no or of all pixels leaves a constant picture, too, hence not exactly 0 or a half.
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


# ---- data set


def picture_table(count=12, broken=(), size=16):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = [encode(photo(size, size, seed=i)) for i in range(count)]
    data = [
        {"path": None, "bytes": bytes_[: len(bytes_) // 2] if i in broken else bytes_} for i, bytes_ in enumerate(data)
    ]
    return datasets.Dataset.from_dict({"image": data, "label": [i % 3 for i in range(count)]}, features=features)


class EveryRng(torch.nn.Module):
    """Draws from the three generators, as RandAugment and torchvision do between them."""

    def forward(self, picture):
        draws = [random.randrange(256), int(np.random.randint(256)), int(torch.randint(256, ()))]
        return torch.tensor(draws, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)


def epoch_of(loader, dataset, epoch):
    dataset.set_epoch(epoch)
    return torch.cat([batch["pixels"] for batch in loader])


def test_items_depend_on_seed_epoch_and_index_alone():
    table = picture_table()
    plain = PictureDataset(table, "image", "label", EveryRng(), seed=5)
    expected = {}
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        expected[epoch] = torch.stack([plain[i]["pixels"] for i in reversed(range(12))]).flip(0)
    assert len({tuple(x[:, 0, 0].tolist()) for epoch in (0, 1) for x in expected[epoch]}) == 24  # all differ
    other = PictureDataset(table, "image", "label", EveryRng(), seed=6)
    assert not torch.equal(other[0]["pixels"], expected[0][0])

    for workers, persistent in ((0, False), (2, False), (2, True)):
        dataset = PictureDataset(table, "image", "label", EveryRng(), seed=5)
        loader = DataLoader(
            dataset, 5, collate_fn=PictureCollator(), num_workers=workers, persistent_workers=persistent
        )
        for epoch in (0, 1, 0):
            assert torch.equal(epoch_of(loader, dataset, epoch), expected[epoch]), (workers, persistent, epoch)


def test_spawned_workers_see_the_epoch():
    dataset = PictureDataset(picture_table(4), "image", "label", build_transform("pad_crop"), seed=5)
    loader = DataLoader(
        dataset,
        4,
        collate_fn=PictureCollator(),
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for epoch in (0, 1):
        assert torch.equal(epoch_of(loader, dataset, epoch), torch.stack([dataset[i]["pixels"] for i in range(4)]))


def test_dataset_and_mixing_leave_the_callers_generators_alone():
    dataset = PictureDataset(picture_table(), "image", "label", build_transform("deit", 16))
    collator = PictureCollator(mixer=Mixer(3, 0.8, 1.0))

    def draws():
        return random.random(), np.random.random(), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    batch = collator([dataset[i] for i in range(4)])
    assert draws() == expected
    again = collator([dataset[i] for i in range(4)])
    assert torch.equal(batch["pixels"], again["pixels"]) and torch.equal(batch["labels"], again["labels"])
    dataset.set_epoch(1)
    assert not torch.equal(batch["labels"], collator([dataset[i] for i in range(4)])["labels"])


def test_items_and_undecodable_pictures():
    table = picture_table(broken=(1,))
    dataset = pickle.loads(pickle.dumps(PictureDataset(table, "image", "label")))
    assert len(dataset) == 12
    item = dataset[2]
    assert set(item) == {"pixels", "labels", "seed"} and item["labels"] == 2 and isinstance(item["seed"], int)
    assert torch.equal(item["pixels"], torch.from_numpy(photo(16, 16, seed=2)).permute(2, 0, 1))
    assert set(dataset[1]) == {"skipped"} and dataset[1]["skipped"].startswith("1: ")
    with pytest.raises(IndexError):
        dataset[12]
    with pytest.raises(ValueError, match="image.*label"):
        PictureDataset(table, "img", "label")


# ---- collator


def test_collator_accepts_every_kind_of_item():
    rgb = photo(8, 8)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    for key in ("pixels", "image", "img"):
        kinds = [pixels, rgb, PIL.Image.fromarray(rgb), {"bytes": encode(rgb), "path": None}]
        for label_key in ("labels", "label", "kind"):
            batch = PictureCollator(label_column="kind")([{key: x, label_key: i} for i, x in enumerate(kinds)])
            assert torch.equal(batch["pixels"], torch.stack([pixels] * 4)) and batch["pixels"].is_contiguous()
            assert set(batch) == {"pixels", "labels"}
            assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [0, 1, 2, 3]
    values = torch.randn(2, 3, 8, 8)
    batch = PictureCollator()([{"pixel_values": values[i], "label": [0.25, 0.75]} for i in range(2)])
    assert torch.equal(batch["pixel_values"], values) and "pixels" not in batch
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [[0.25, 0.75]] * 2
    batch = PictureCollator()([{"pixel_values": values[i].numpy(), "labels": np.int64(i)} for i in range(2)])
    assert torch.equal(batch["pixel_values"], values) and batch["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="image, kind"):
        PictureCollator()([{"image": rgb, "kind": 1}])
    with pytest.raises(ValueError, match="picture, label"):
        PictureCollator()([{"picture": rgb, "label": 1}])


def test_collator_shapes_and_frames():
    items = [{"image": photo(20 + i, 30), "label": i} for i in range(3)]
    with pytest.raises(ValueError, match="size"):
        PictureCollator()(items)
    batch = PictureCollator(size=16)(items)
    assert batch["pixels"].shape == (3, 3, 16, 16) and batch["pixels"].dtype == torch.uint8
    for item, pixels in zip(items, batch["pixels"], strict=True):
        expected = np.asarray(PIL.Image.fromarray(item["image"]).resize((16, 16), PIL.Image.BICUBIC))
        assert np.abs(pixels.permute(1, 2, 0).int().numpy() - expected.astype(int)).max() <= 2
    assert PictureCollator(size=16)(items[:1])["pixels"].shape == (1, 3, 20, 30)

    def frame(side):
        return lambda pictures: torch.stack([picture[:, :side, :side] for picture in pictures])

    batch = PictureCollator(frame=frame(4), teacher_frame=frame(8))(items)
    assert batch["pixels"].shape == (3, 3, 4, 4) and batch["teacher_pixels"].shape == (3, 3, 8, 8)
    assert torch.equal(batch["teacher_pixels"][:, :, :4, :4], batch["pixels"])
    for wrong in ({"teacher_frame": frame(4)}, {"keep_skipped": True}):
        with pytest.raises(ValueError, match="mixer"):
            PictureCollator(mixer=Mixer(3, 1.0), **wrong)


def test_collator_drops_or_keeps_what_cannot_be_decoded():
    dataset = PictureDataset(picture_table(broken=(0, 2)), "image", "label")
    items = [dataset[i] for i in range(4)] + [{"image": b"broken", "label": 1}]
    batch = PictureCollator()(items)
    assert batch["pixels"].shape == (2, 3, 16, 16) and batch["labels"].tolist() == [1, 0]
    assert [text.split(":")[0] for text in batch["skipped"]] == [
        "0",
        "2",
        "no picture file that Pillow knows; it begins with b'broken'",
    ]
    kept = PictureCollator(keep_skipped=True)(items)
    assert kept["labels"].tolist() == [-100, 1, -100, 0, -100] and kept["skipped"] == batch["skipped"]
    assert kept["pixels"].shape == (5, 3, 16, 16) and kept["pixels"][[0, 2, 4]].sum() == 0
    assert torch.equal(kept["pixels"][[1, 3]], batch["pixels"])

    soft = [{"image": photo(8, 8), "label": [0.5, 0.5]}, {"skipped": "x"}]
    assert PictureCollator(keep_skipped=True)(soft)["labels"].tolist() == [[0.5, 0.5], [-100, -100]]
    lost = [{"skipped": "a.png: truncated"}, {"skipped": "b.png: empty"}]
    for collator in (PictureCollator(), PictureCollator(keep_skipped=True)):
        with pytest.raises(ValueError, match="a.png: truncated; b.png: empty"):
            collator(lost)
    for options in ({"size": 6}, {"frame": lambda pictures: torch.stack([x[:, :6, :6] for x in pictures])}):
        batch = PictureCollator(keep_skipped=True, **options)(lost)
        assert batch["pixels"].shape == (2, 3, 6, 6) and batch["labels"].tolist() == [-100, -100]


def test_collator_mixes_last():
    items = [{"pixels": photo(8, 8, seed=i), "labels": i, "seed": 7} for i in range(4)]
    batch = PictureCollator(mixer=Mixer(4, mixup_alpha=1.0))(items)
    pixels = torch.stack([torch.from_numpy(item["pixels"]).permute(2, 0, 1) for item in items]) / 255
    expected = torch.einsum("bc,chwd->bhwd", batch["labels"], pixels)
    assert 0 < batch["labels"].max() < 1 and torch.allclose(batch["pixels"], expected, atol=1e-5)


# ---- columns and loading


def test_find_columns():
    image, label, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")

    def found(*given, **features):
        return find_columns(datasets.Features(features), *given)

    assert found(image=image, label=label) == ("image", "label")
    assert found(x=text, photo=image, kind=label) == ("photo", "kind")
    assert found(photo=image, img=image, coarse_label=label, fine_label=label) == ("img", "fine_label")
    assert found("photo", "x", x=text, photo=image, img=image, label=label) == ("photo", "x")
    raw = {"bytes": datasets.Value("binary"), "path": text}
    assert found(img=raw, labels=datasets.Value("int64")) == ("img", "labels")
    assert find_columns(picture_table(3)) == ("image", "label")
    for given, features, message in (
        ((), {"a": image, "b": image, "label": label}, "several.*a, b.*--image_column"),
        ((), {"image": image, "p": label, "q": label}, "several.*p, q.*--label_column"),
        ((), {"x": text, "label": label}, "none.*x.*label.*--image_column"),
        ((), {"image": image, "x": text}, "none.*image.*x.*--label_column"),
        (("foto",), {"image": image, "label": label}, "'foto'.*--image_column.*image.*label"),
        ((None, "klass"), {"image": image, "label": label}, "'klass'.*--label_column.*image.*label"),
    ):
        with pytest.raises(ValueError, match=message):
            found(*given, **features)
    assert class_names(picture_table(3), "label") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="label"):
        class_names(datasets.Dataset.from_dict({"label": [1]}), "label")


def write_parquet(folder, labels_of, column="label", image="img", picture=True):
    folder.mkdir(exist_ok=True, parents=True)
    for split, labels in labels_of.items():
        columns = {column: labels}
        if picture:
            columns[image] = [{"bytes": encode(photo(8, 8, seed=i)), "path": None} for i in range(len(labels))]
        table = datasets.Dataset.from_dict(columns)
        if picture:
            table = table.cast_column(image, datasets.Image())
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def first_pixel(row, image="image"):
    return tuple(np.asarray(row[image])[0, 0].tolist())


def test_load_parquet_folder_with_integer_labels(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1, 2, 3] * 5, "test": [0, 4]})
    data = load_data(folder)
    assert (len(data.train), len(data.eval), data.image_column, data.label_column) == (20, 2, "img", "label")
    assert data.names == list("01234") == data.train.features["label"].names == data.eval.features["label"].names
    assert data.train["label"][:] == [0, 1, 2, 3] * 5 and data.name == folder and data.revision is None
    assert first_pixel(data.train[3], "img") == tuple(photo(8, 8, seed=3)[0, 0])
    assert load_data(folder, eval_split="test", train_split="test", eval_fraction=0.5).train.num_rows == 1


def test_load_text_labels_the_same_way_in_both_splits(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": ["dog", "cat", "dog", "ant"], "validation": ["eel", "cat"]})
    data = load_data(folder)
    assert data.names == ["ant", "cat", "dog", "eel"]
    assert data.train["label"][:] == [2, 1, 2, 0] and data.eval["label"][:] == [3, 1]


def test_load_holds_out_the_same_stratified_part(tmp_path, caplog):
    path = write_parquet(tmp_path / "d", {"pictures": [0] * 50 + [1] * 30 + [2] * 20}) + "/pictures.parquet"
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(path, eval_fraction=0.2)
    assert len([r for r in caplog.records if r.name == loading.__name__]) == 1 and "held out" in caplog.text
    assert len(data.train) == 80 and np.bincount(data.eval["label"][:]).tolist() == [10, 6, 4]
    pixels = [
        [row["bytes"] for row in part.cast_column("img", datasets.Image(decode=False))["img"]]
        for part in (data.train, data.eval)
    ]
    assert len(set(pixels[0])) == 80 and not set(pixels[0]) & set(pixels[1])
    again, other = load_data(path, eval_fraction=0.2), load_data(path, eval_fraction=0.2, seed=1)
    assert again.eval.to_dict() == data.eval.to_dict() != other.eval.to_dict()
    with pytest.raises(ValueError, match="eval_fraction=0.001"):
        load_data(path, eval_fraction=0.001)


def test_load_fewer_samples(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": list(range(30)), "test": list(range(30))})
    data = load_data(folder, max_train_samples=6, max_eval_samples=100)
    assert len(data.train) == 6 and len(data.eval) == 30 and len(data.names) == 30
    assert data.train["label"][:] == load_data(folder, max_train_samples=6).train["label"][:]
    assert data.train["label"][:] != load_data(folder, max_train_samples=6, seed=1).train["label"][:]
    assert data.train["label"][:] != list(range(6))
    with pytest.raises(ValueError, match="max_eval_samples"):
        load_data(folder, max_eval_samples=0)


def write_images(folder, classes, count=5):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encode(photo(8, 8, seed=100 * k + i)))
    return str(folder)


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation"])
def test_load_image_folder_with_splits(tmp_path, split):
    write_images(tmp_path / "d" / "train", ["cat", "dog"])
    write_images(tmp_path / "d" / split, ["cat", "dog"], count=2)
    data = load_data(str(tmp_path / "d"))
    assert (len(data.train), len(data.eval), data.names) == (10, 4, ["cat", "dog"])
    assert sorted(zip([first_pixel(row) for row in data.train], data.train["label"], strict=True)) == sorted(
        (tuple(photo(8, 8, seed=100 * k + i)[0, 0].tolist()), k) for k in (0, 1) for i in range(5)
    )


def test_load_image_folder_without_splits(tmp_path, monkeypatch):
    # load_dataset alone would take "freight train" for the training split, and drop the other classes.
    write_images(tmp_path / "d", ["bus", "eval", "freight train"])
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "d"), "./d", "d"):
        data = load_data(name, eval_fraction=0.2)
        assert (len(data.train), len(data.eval), data.names) == (12, 3, ["bus", "eval", "freight train"])


def test_load_image_folder_with_an_unlabelled_test_set(tmp_path, caplog):
    write_images(tmp_path / "d" / "train", ["cat", "dog"])
    write_images(tmp_path / "d", ["test"])
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(str(tmp_path / "d"), eval_fraction=0.2)
    assert (len(data.train), len(data.eval), data.names) == (8, 2, ["cat", "dog"])
    assert "test is left out" in caplog.text and "held out" in caplog.text
    write_images(tmp_path / "flat", ["train", "test"])  # no two classes "train" and "test"
    with pytest.raises(ValueError, match="train, test.*folder for each class"):
        load_data(str(tmp_path / "flat"))


def test_load_what_save_to_disk_wrote(tmp_path):
    datasets.DatasetDict(train=picture_table(9), test=picture_table(3)).save_to_disk(str(tmp_path / "d"))
    data = load_data(str(tmp_path / "d"))
    assert (len(data.train), len(data.eval), data.names) == (9, 3, ["a", "b", "c"])


def test_load_from_the_hub_asks_for_the_right_thing(monkeypatch):
    class Revision(str):
        resolved = "c0ffee" * 6 + "abcd"

    asked, splits = [], datasets.DatasetDict(train=picture_table(9), validation=picture_table(3))
    splits["test"] = picture_table(3).select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or splits)
    monkeypatch.setattr(loading, "resolve", lambda name, revision, kind: Revision(f"{revision} of {kind} {name}"))
    data = load_data("owner/name", config_name="small", revision="v1")
    assert asked == [(("owner/name", "small"), {"revision": "v1 of dataset owner/name"})]
    assert (len(data.train), len(data.eval), data.name, data.revision) == (9, 3, "owner/name", Revision.resolved)
    assert (data.train_split, data.eval_split) == ("train", "validation")
    with pytest.raises(ValueError, match=r"'test'.*empty.*train \(9\), validation \(3\), test \(0\)"):
        load_data("owner/name", eval_split="test")


def test_load_quickstart(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "QUICKSTART", tmp_path / "q")
    with pytest.raises(ValueError, match="clone"):
        load_data("quickstart")
    write_parquet(tmp_path / "q", {"train": [0, 1], "test": [1]})
    assert len(load_data("quickstart").train) == 2


def test_load_errors_say_what_there_is_and_the_way_out(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError(f"went looking for {args}")

    good = write_parquet(tmp_path / "good", {"train": [0, 1], "test": [1, 0]})
    for options, message in (
        ({"eval_split": "dev"}, "'dev'.*--eval_split.*train, test"),
        ({"train_split": "all"}, "'all'.*--train_split.*train, test"),
        ({"label_column": "klass"}, "'klass'.*--label_column.*label.*img"),
        ({"image_column": "foto"}, "'foto'.*--image_column.*label.*img"),
        ({"label_column": "img"}, "img.*no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(good, **options)
    for number, (splits, message) in enumerate(
        (
            ({"train": [0, 1], "test": [-1, -1]}, r"2 of the 2 labels.*'test'.*\[-1\].*--eval_split"),
            ({"train": [0, None], "test": [1, 0]}, r"1 of the 2 labels.*'train'.*missing"),
            ({"train": ["a", None], "test": ["a", "b"]}, r"1 of the 2 labels.*'train'.*missing"),
            ({"train": [0.5, 1.0], "test": [1.0, 0.0]}, "float64.*no labels.*img"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            load_data(write_parquet(tmp_path / f"bad{number}", splits))
    with pytest.raises(ValueError, match="none.*kind.*img.*--label_column"):
        load_data(write_parquet(tmp_path / "nolabel", {"train": [0, 1]}, column="kind"))
    with pytest.raises(ValueError, match="none.*--image_column"):
        load_data(write_parquet(tmp_path / "nopicture", {"train": [0, 1]}, picture=False))
    pq.write_table(pq.read_table(f"{good}/train.parquet").slice(0, 0), tmp_path / "good" / "validation.parquet")
    with pytest.raises(ValueError, match="validation.parquet.*empty"):
        load_data(good)

    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void"):
        load_data(str(tmp_path / "void"))
    monkeypatch.setattr(datasets, "load_dataset", never)
    for name in ("./nowhere", "/nowhere/x", "~/nowhere", "nowhere/train.parquet"):
        with pytest.raises(ValueError, match="local path"):
            load_data(name)


def test_labels_beyond_the_names(tmp_path):
    features = picture_table(3).features
    table = picture_table(3).cast_column("label", datasets.Value("int64"))
    table = datasets.Dataset(table.data.table.set_column(1, "label", [[0, 1, 7]]))
    table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=r"1 of the 3 labels.*\[7\]"):
        encode_labels({"train": table}, "label")
