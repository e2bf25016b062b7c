"""Time each loss function, forward and backward, against F.cross_entropy: `python -m benchmarks.loss [--markdown]`.

The losses run in turn (A B C A B C ...) in one process, so that a busy machine slows all of them alike; the ratio of
a round is that round's time over the same round's cross entropy. The table gives the median over the rounds, and the
ratio of the fastest times, which a busy machine disturbs least.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kd.losses import KDLoss, NKDLoss, USKDLoss, kd_loss, nkd_loss, uskd_loss


def build(batch: int, classes: int, device: str) -> dict[str, Callable[[], object]]:
    """One function per row of the table; each runs forward and backward."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, weak = (torch.randn(batch, classes, generator=generator).to(device) for _ in range(3))
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    mixed = 0.7 * F.one_hot(labels, classes) + 0.3 * F.one_hot(labels.flip(0), classes)
    student.requires_grad_()
    weak.requires_grad_()

    kd, nkd, uskd = KDLoss(), NKDLoss(), USKDLoss()

    def backward(terms: dict[str, Tensor], *inputs: Tensor) -> object:
        return torch.autograd.grad(sum(terms.values()), inputs)

    return {
        "F.cross_entropy": lambda: backward({"ce": F.cross_entropy(student, labels)}, student),
        "kd_loss": lambda: backward(kd_loss(student, teacher), student),
        "nkd_loss": lambda: backward(nkd_loss(student, teacher, labels), student),
        "nkd_loss, t = 3": lambda: backward(nkd_loss(student, teacher, labels, temperature=3.0), student),
        "nkd_loss, mixed labels": lambda: backward(nkd_loss(student, teacher, mixed), student),
        "uskd_loss": lambda: backward(uskd_loss(student, weak, labels), student, weak),
        "uskd_loss, mixed labels": lambda: backward(uskd_loss(student, weak, mixed), student, weak),
        "KDLoss, with CE": lambda: backward(kd(student, labels, teacher_logits=teacher), student),
        "NKDLoss, with CE": lambda: backward(nkd(student, labels, teacher_logits=teacher), student),
        "USKDLoss, with CE": lambda: backward(uskd(student, labels, aux_logits=weak), student, weak),
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of forward and backward of each function, `rounds` of them after 3 to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    args = parser.parse_args()

    seconds = measure(build(args.batch, args.classes, args.device), args.rounds, args.device)
    base = seconds["F.cross_entropy"]
    hardware = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU"
    print(
        f"{hardware}, {torch.get_num_threads()} thread(s), python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, float32, "
        f"B {args.batch}, C {args.classes}, {args.rounds} rounds\n"
    )
    rows = [("forward + backward", "median ms", "median ratio", "ratio of fastest")]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        fastest = min(times) / min(base)
        rows.append((name, f"{statistics.median(times) * 1e3:.2f}", f"{ratio:.2f}", f"{fastest:.2f}"))
    if args.markdown:
        rows.insert(1, ("---", "---:", "---:", "---:"))
    for row in rows:
        if args.markdown:
            print(f"| {' | '.join(row)} |")
        else:
            print(f"{row[0]:28}{row[1]:>12}{row[2]:>14}{row[3]:>18}")


if __name__ == "__main__":
    main()
