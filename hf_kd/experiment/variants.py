"""Which runs the arguments ask for: each loss of a comparison with each seed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config import DistillationConfig, read_json
from ..losses import loss_class, named_settings
from ..recipes import published_hyperparameters
from ..reporting.controls import CONTROLS, PERMUTED, RANDOM, SAME_TIME
from ..reporting.significance import BASELINE


def variant_name(loss: str) -> str:
    """By which name records and folders know a loss that `--loss`, `--compare` or `--against` names."""
    return loss_class(loss).name if ":" in loss else loss


def controls(script, config: DistillationConfig) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By the names of the variants that `--controls` makes controls: the hyperparameters, with the loss's name under
    "loss", and the kind and of which variant (None: of all). ValueError for those that do not fit what is compared."""
    asked, kinds = _asked(script, config), list(dict.fromkeys(script.controls or ()))
    if unknown := [kind for kind in kinds if kind not in CONTROLS]:
        raise ValueError(f"--controls {unknown[0]} is unknown; there are: {', '.join(CONTROLS)}.")
    if kinds and not script.verdict and script.compare is None:
        raise ValueError(f"--controls {' '.join(kinds)} goes with --verdict or --compare.")
    classes = {name: loss_class(values.get("loss", name)) for name, values in asked.items()}
    baseline = variant_name(script.against or BASELINE)
    distil = [name for name, cls in classes.items() if BASELINE not in (name, cls.name) and name != baseline]
    if kinds and not distil:
        raise ValueError(f"--controls {' '.join(kinds)}: no variant distils, so that there is nothing to control.")
    found: dict[str, tuple[dict, dict]] = {}
    for kind in kinds:
        mark = {"kind": kind, "of": None}
        if kind in (RANDOM, PERMUTED):
            taught = [name for name in distil if "teacher_logits" in classes[name].requires]
            if not taught:
                raise ValueError(f"--controls {kind} is for losses that learn from a teacher, of which there is none.")
            for name in taught:
                values = {"loss": name, **asked[name]}
                found[f"{variant_name(name)}-{kind}"] = values, mark | {"of": variant_name(name)}
        elif kind in asked and kind != SAME_TIME:
            if classes[kind].name != BASELINE:
                raise ValueError(f"--controls {kind} is the name of another variant of --compare: rename that one.")
            found[kind] = asked[kind], mark
        else:
            values = {"loss": kind}
            if kind == SAME_TIME:  # with the hyperparameters of plain training
                plain = baseline if baseline in asked and classes[baseline].name == BASELINE else BASELINE
                given = asked.get(plain, {})
                values = named_settings(given.get("loss", plain)) | given | {"loss": BASELINE}
            smoothing = (config.loss_kwargs or {}).get("label_smoothing") if script.verdict else None
            if kind == "label_smoothing" and (smoothing or config.label_smoothing_factor):
                raise ValueError("--controls label_smoothing: the labels of all runs are smoothed already. Drop it.")
            if smoothing is not None:
                values.setdefault("label_smoothing", smoothing)
            found[kind] = values, mark
    if twice := [name for name, (values, _) in found.items() if asked.get(name, values) is not values]:
        raise ValueError(f"--compare has a variant {twice[0]}, the name of a control: rename it.")
    return found


def _asked(script, config: DistillationConfig) -> dict[str, dict]:
    """The hyperparameters of the variants without those that `--controls` adds, with the loss's name under "loss"."""
    numbers = config.loss_kwargs or {}
    single = {config.loss: {"loss": config.loss, **numbers}}
    if script.verdict:
        smoothing = {"label_smoothing": numbers["label_smoothing"]} if "label_smoothing" in numbers else {}
        others = {BASELINE: {"loss": "ce"}, **config.loss_class().controls}
        if script.against:
            others.setdefault(variant_name(script.against), {"loss": script.against})
        return {name: {**values, **smoothing} for name, values in others.items()} | single
    if script.compare is None:
        return single
    asked = script.compare
    if isinstance(asked, str):
        asked = read_json("compare", asked) if asked.lstrip().startswith("{") else asked.split(",")
    if not isinstance(asked, dict):
        names = [name for word in asked if (name := str(word).strip())]
        asked = {variant_name(name): {"loss": name} for name in names}
        if len(asked) < len(names):
            raise ValueError(
                f"--compare names a loss twice: {', '.join(names)}. With other hyperparameters, give it as JSON with "
                'a name for each: --compare \'{"nkd": {}, "nkd-t2": {"loss": "nkd", "temperature": 2}}\'.'
            )
    if not asked:
        raise ValueError("--compare has no loss in it: name at least one, as in --compare ce,nkd.")
    for name, values in asked.items():
        if not isinstance(values, (dict, type(None))):
            raise ValueError(f"--compare {name}: hyperparameters must be a JSON object, got {values!r}.")
        if not name or set(name) & set('/\\:*?"<>|') or name.startswith("."):
            raise ValueError(f"--compare {name!r} can't be the name of a folder: choose another.")
    if script.against and variant_name(script.against) not in asked:
        raise ValueError(f"--against {script.against} is none of the variants: choose one of {', '.join(asked)}.")
    return {name: dict(values or {}) for name, values in asked.items()}


def check_only(only: str, names: Sequence[str]) -> None:
    """Raises ValueError if `--only` names none of the runs, each "variant:seed"."""
    if only not in names:
        raise ValueError(f"--only {only} is no run of this experiment; there are: {', '.join(names)}.")


def run_configs(script, config: DistillationConfig, recipe: str | None) -> list[tuple[str, str, DistillationConfig]]:
    """Name, folder (within the experiment's) and arguments of each run, seed by seed."""
    added = controls(script, config)
    losses = _asked(script, config) | {name: values for name, (values, _) in added.items()}
    seeds = script.seeds or [config.seed + i for i in range(3 if script.verdict else 1)]
    runs = []
    for seed in seeds:  # the outer loop, so that a comparison that is cut off has whole pairs
        for name, values in losses.items():
            values = dict(values)
            loss = values.pop("loss", name)
            name = variant_name(loss) if name == loss else name
            if recipe:
                values = published_hyperparameters(loss, recipe)[0] | values
            several = ([name] if len(losses) * len(seeds) > 1 else []) + ([f"seed-{seed}"] if seeds[1:] else [])
            run = replace(
                config,
                loss=loss,
                loss_kwargs=values,
                seed=seed,
                data_seed=seed if config.data_seed == config.seed else config.data_seed,
                output_dir=os.path.join(config.output_dir, *several),
                run_name="-".join([config.run_name or os.path.basename(config.output_dir), *several]),
                push_to_hub=False,  # done once for the experiment, after everything is saved
            )
            # In a comparison the teacher also measures the agreement of students that do not learn from it.
            if "teacher_logits" in run.loss_class().requires or not (script.verdict or script.compare):
                run.check_teacher(script.teacher is not None)
            kind = added[name][1]["kind"] if name in added else None
            if kind == RANDOM:
                run.teacher_check_batches = 0  # which would warn of a teacher near chance
            if kind == PERMUTED:
                _check_permuted(script, run)
            if kind == SAME_TIME and run.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
                raise ValueError(
                    f"--controls {kind}: a learning rate that follows the evaluations ({run.lr_scheduler_type}) can't "
                    "be stretched over more steps. Choose another --lr_scheduler_type."
                )
            runs.append((name, os.path.join(*several) if several else ".", run))
    return runs


def _check_permuted(script, run: DistillationConfig) -> None:
    """Raises ValueError where the outputs of a teacher can't be exchanged among images."""
    if script.streaming:
        raise ValueError(f"--controls {PERMUTED} needs all images at hand: it does not go with --streaming.")
    if run.mixup_alpha or run.cutmix_alpha:
        raise ValueError(
            f"--controls {PERMUTED}: mixed images have no label whose images could be exchanged. Add --mixup_alpha 0 "
            f"--cutmix_alpha 0 (mixup_alpha is {run.mixup_alpha:g}, cutmix_alpha {run.cutmix_alpha:g})."
        )
