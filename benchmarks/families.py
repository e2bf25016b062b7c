"""Which architectures work: every image-classification class of transformers, and over 100 architectures of timm.

    python benchmarks/families.py --results families.jsonl > families.md

Each is tried as a student of ce, nkd and uskd (two training steps, an evaluation, saved, reopened with the same
logits) and as a teacher, with random weights, few layers and small images, without the network. USKD gets no
feature_module. Each architecture has a process of its own. A line of JSON is written when one is done, and those that
are in the file are not run again: `--retry` repeats the ones that did not work.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, ResNetConfig, ResNetForImageClassification, ViTImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from hf_kd import DistillationConfig, DistillationTrainer, load_student, load_teacher
from hf_kd.labels import label_maps
from hf_kd.models.forward import logits_of
from hf_kd.reporting.record import collect_versions

NAMES = ["cat", "dog", "owl", "fox"]
COLUMNS = ("ce", "nkd", "teacher", "uskd")
SECONDS = 900  # for one architecture

TIMM = """
    bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224
    convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_9_240 cs3darknet_s cspresnet50 davit_tiny
    deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 dla34 dpn48b eca_nfnet_l0
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_100
    gmixer_24_224 gmlp_ti16_224 halonet26t hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto
    inception_v3 lambda_resnet26t lcnet_050 legacy_seresnet18 levit_128s levit_conv_128s mambaout_femto
    maxvit_pico_rw_256 maxxvitv2_nano_rw_256 mixer_s32_224 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs
    mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv5_base mobileone_s0
    mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small nf_resnet50 pit_ti_224
    pit_ti_distilled_224 poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnetx_016 regnety_002 repghostnet_050
    repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnet34 resnet50 resnetv2_50
    resnext50_32x4d rexnet_100 samvit_base_patch16_224 selecsls42b semnasnet_075 sequencer2d_s shvit_s1 skresnet18
    starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
    tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tnt_s_patch16_224 twins_pcpvt_small twins_svt_small vgg11_bn
    visformer_tiny vit_base_patch16_clip_224 vit_base_patch16_siglip_gap_224 vit_dwee_patch16_reg1_gap_256
    vit_pwee_patch16_reg1_gap_256 vit_relpos_small_patch16_224 vit_small_r26_s32_224 vit_tiny_patch16_224
    vit_wee_patch16_reg1_gap_256 vitamin_small_224 volo_d1_224 vovnet39a xception41 xcit_nano_12_p16_224
""".split()

# Fewer and narrower layers, for every config that has such a number; lists of depths are cut to two blocks a stage.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "n_layer": 4,
}
BY_TYPE = {
    "cvt": {"depth": [1, 2, 4]},  # more blocks than stages before it, in each
    "efficientnet": {"image_size": 128, "num_hidden_layers": None},
    "hgnet_v2": {"stage_num_blocks": [1, 1, 2, 1]},
    "textnet": {"image_size": [128, 128]},
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 64, "num_latents": 16, "num_cross_attention_heads": 1},
    "pvt": {"num_labels": 6},
    "timm_wrapper": {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 128, 128]}},
}


def transformers_classes() -> list[str]:
    """`MODEL_TYPE/CLASS` of every image-classification class."""
    names = {key: value if isinstance(value, tuple) else (value,) for key, value in CLASSES.items()}
    return [f"{key}/{name}" for key, values in names.items() for name in values]


def tiny_config(model_type: str):
    settings = dict(BY_TYPE.get(model_type, {}))
    default = CONFIG_MAPPING[model_type]()
    for key, value in default.to_dict().items():
        if isinstance(value, int) and key in SMALL and model_type != "perceiver":
            settings.setdefault(key, SMALL[key])
        elif key in ("depths", "depth") and isinstance(value, list):
            settings.setdefault(key, [min(depth, 2) for depth in value])
    if "vision_config" in default.to_dict():
        settings["vision_config"] = SMALL
    settings = {key: value for key, value in settings.items() if value is not None}
    return CONFIG_MAPPING[model_type](**settings, **label_maps([f"class {i}" for i in range(6)]))


def from_transformers(name: str, folder: str):
    """Saves a tiny model. Gives what loads a student with new classes, and the same model as a teacher."""
    model_type, class_name = name.split("/")
    config = tiny_config(model_type)
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or 224
    size = size if isinstance(size, int) else size[0]
    model = getattr(transformers, class_name)(config)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return lambda: load_student(folder, NAMES), lambda: load_teacher(folder, NAMES, class_map=[0, 1, 2, 3])


def from_timm(name: str, folder: str):
    for size in (128, None):
        with contextlib.suppress(ValueError):
            load_student(f"timm/{name}", NAMES, from_scratch=True, image_size=size)
            break

    def student():
        return load_student(f"timm/{name}", NAMES, from_scratch=True, image_size=size)

    def teacher():
        model, processor = student()
        return load_teacher(model, processor=processor)

    return student, teacher


def tiny_student():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", **label_maps(NAMES)
    )
    return ResNetForImageClassification(config), ViTImageProcessor(size={"height": 64, "width": 64})


def train(folder: str, student, loss: str, teacher=None) -> DistillationTrainer:
    """Two steps and an evaluation. Raises if the loss is not finite."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (96, 128, 3), np.uint8)) for _ in range(8)]
    data = [(image, i % len(NAMES)) for i, image in enumerate(images)]
    model, processor = student
    config = DistillationConfig(
        folder, loss=loss, augment="flip", max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        learning_rate=1e-4, save_strategy="no", logging_steps=1, disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model, config, teacher=teacher, train_dataset=data, eval_dataset=data, processing_class=processor
    )
    trainer.train()
    loss_after = trainer.evaluate()["eval_loss"]
    if not np.isfinite(loss_after):
        raise FloatingPointError(f"the loss is {loss_after}")
    return trainer


@torch.no_grad()
def reopen(trainer: DistillationTrainer, folder: str, is_timm: bool) -> None:
    """Raises if what is saved is not what was trained."""
    trainer.save_model(folder)
    pixels = torch.randint(0, 256, (2, 3, 150, 150), dtype=torch.uint8)
    values = trainer.preprocessing(pixels)
    expected = logits_of(trainer.model.eval()(values))
    model, processor = load_student(folder)
    values_again = type(trainer.preprocessing)(processor)(pixels)
    torch.testing.assert_close(values_again, values)
    torch.testing.assert_close(logits_of(model.eval()(values_again)), expected, rtol=1e-4, atol=1e-4)
    if is_timm:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        torch.testing.assert_close(model.eval()(values), expected, rtol=1e-4, atol=1e-4)


def describe(error: BaseException, folder: str) -> str:
    lines = [line.strip() for line in str(error).replace(f"{folder}/start", "MODEL").splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


def try_architecture(name: str, send) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = open(os.devnull, "w")  # the trainer's log lines
    is_timm = "/" not in name
    result = {}

    def attempt(column: str, function) -> None:
        start = time.perf_counter()
        try:
            result[column] = function() or "ok"
        except (Exception, SystemExit) as error:
            result[column] = describe(error, folder)
        result["seconds"] = result.get("seconds", 0) + round(time.perf_counter() - start, 1)

    with tempfile.TemporaryDirectory() as folder:
        try:
            student, teacher = (from_timm if is_timm else from_transformers)(name, f"{folder}/start")
        except Exception as error:
            send.send(dict.fromkeys(COLUMNS, describe(error, folder)))
            return
        small = tiny_student()

        def as_student(loss: str) -> None:
            other = load_teacher(small[0], processor=small[1]) if loss == "nkd" else None
            trainer = train(f"{folder}/{loss}", student(), loss, other)
            if loss == "uskd":
                result["layer"] = str(trainer.auxiliary_head.layer)
            reopen(trainer, f"{folder}/{loss}", is_timm)

        for loss in ("ce", "nkd", "uskd"):
            attempt(loss, lambda loss=loss: as_student(loss))
        attempt("teacher", lambda: train(f"{folder}/teacher", tiny_student(), "nkd", teacher()) and None)
    send.send(result)


def run(name: str, context) -> dict:
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=try_architecture, args=(name, send))
    process.start()
    send.close()
    result = dict.fromkeys(COLUMNS, f"no result within {SECONDS} s")
    try:
        if receive.poll(SECONDS):
            result = receive.recv()
    except EOFError:
        process.join()
        result = dict.fromkeys(COLUMNS, f"crashed with exit code {process.exitcode}")
    process.join(10)
    process.kill()
    return {"name": name, **result}


def table(results: list[dict]) -> str:
    lines = []
    classes = [result for result in results if "/" in result["name"]]
    networks = [result for result in results if "/" not in result["name"]]
    firsts = {result["name"].split("/")[0]: result for result in reversed(classes)}.values()
    for title, ours, counted in (
        ("transformers", classes, {"classes": classes, "model types, by their first class": firsts}),
        ("timm", networks, {"architectures": networks}),
    ):
        lines += [f"\n## {title}\n", f"| architecture | {' | '.join(COLUMNS)} | feature layer |", "|---" * 6 + "|"]
        for result in ours:
            cells = [result[column].replace("|", "\\|") for column in COLUMNS]
            same = len(set(cells)) == 1 and cells[0] != "ok"
            cells = [cells[0], '"', '"', '"'] if same else cells
            lines.append(f"| {' | '.join([result['name'], *cells, result.get('layer', '')])} |")
        for what, counted_results in counted.items():
            counts = [sum(result[column] == "ok" for result in counted_results) for column in COLUMNS]
            lines.append(f"| **of {len(counted_results)} {what}** | {' | '.join(map(str, counts))} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("families.jsonl"), help="file that is continued")
    parser.add_argument("--retry", action="store_true", help="repeat what did not work")
    parser.add_argument("--only", nargs="+", help="these alone: timm names, and MODEL_TYPE/CLASS of transformers")
    args = parser.parse_args()
    names = args.only or [*transformers_classes(), *TIMM]
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = {result["name"]: result for result in map(json.loads, lines)}
    context = multiprocessing.get_context("forkserver")  # a process each, which has imported everything already
    context.set_forkserver_preload(["timm", "hf_kd.trainer", "hf_kd.models.student"])
    for name in names:
        known = done.get(name)
        if known and not (args.retry and any(known[column] != "ok" for column in COLUMNS)):
            continue
        done[name] = run(name, context)
        with args.results.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
        outcome = ", ".join(f"{column} {done[name][column][:100]}" for column in COLUMNS)
        print(f"{name}: {outcome}", file=sys.stderr)
    versions = collect_versions()
    print(table([done[name] for name in names]))
    print("\n" + ", ".join(f"{key} {versions[key]}" for key in ("python", "torch", "transformers", "timm")))


if __name__ == "__main__":
    main()
