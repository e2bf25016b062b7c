"""Which runs the arguments ask for: each loss of a comparison with each seed."""

import os
from collections.abc import Sequence
from dataclasses import replace

from ..config import DistillationConfig, read_json
from ..losses import loss_class
from ..recipes import published_hyperparameters
from ..reporting.significance import BASELINE


def variant_name(loss: str) -> str:
    """By which name records and folders know a loss that `--loss`, `--compare` or `--against` names."""
    return loss_class(loss).name if ":" in loss else loss


def variants(script, config: DistillationConfig) -> dict[str, dict]:
    """The losses to train with: hyperparameters by the name of the variant, with the loss's name under "loss"."""
    numbers = config.loss_kwargs or {}
    single = {config.loss: {"loss": config.loss, **numbers}}
    if script.verdict:
        smoothing = {"label_smoothing": numbers["label_smoothing"]} if "label_smoothing" in numbers else {}
        controls = {BASELINE: {"loss": "ce"}, **config.loss_class().controls}
        if script.against:
            controls.setdefault(variant_name(script.against), {"loss": script.against})
        return {name: {**values, **smoothing} for name, values in controls.items()} | single
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
    losses = variants(script, config)
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
            runs.append((name, os.path.join(*several) if several else ".", run))
    return runs
