"""Logits and labels for the tests of losses, and how they compare values and gradients."""

import torch

B, C = 6, 7
CLASSES = [3, 0, 6, 2, 3, 5]
SECOND = [1, 5, None, 4, 6, None]  # the second image of a mixed pair; None: the row was not mixed


def logits(seed, dtype=torch.float32, classes=C, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(B, classes, generator=generator, dtype=torch.float64)).to(dtype)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def label_case(kind):
    """Labels as the code gets them, and by hand what they mean: (class, label value) of each row's targets."""
    if kind == "int":
        return torch.tensor(CLASSES), [[(c, 1.0)] for c in CLASSES]
    mixed = "mixed" in kind
    smooth = 0.1 if "smooth" in kind else 0.0
    labels, meaning = torch.full((B, C), smooth / C, dtype=torch.float64), []
    for row, (first, second) in enumerate(zip(CLASSES, SECOND, strict=True)):
        shares = [(first, 0.7), (second, 0.3)] if mixed and second is not None else [(first, 1.0)]
        meaning.append([(c, share * (1 - smooth) + smooth / C) for c, share in shares])
        for c, value in meaning[-1]:
            labels[row, c] = value
    return labels, meaning


def same(actual, expected, rtol=1e-5, atol=0.0):
    """Equal to 1e-5; entries that cancel to near 0 to 1e-6 of the largest."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    atol = max(atol, 1e-6 * expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def grad(term, x):
    (result,) = torch.autograd.grad(term, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if result is None else result
