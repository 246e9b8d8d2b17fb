"""Pearson's test of counts against the counts that were expected."""


def chi_square_statistic(counts, expected):
    """Return (statistic, degrees of freedom); ids that are expected fewer than 10 times are one class together."""
    import torch

    common = expected >= 10
    pairs = [
        torch.cat([values[common].double(), values[~common].sum().double()[None]]) for values in (counts, expected)
    ]
    observed, wanted = pairs
    if wanted[-1] < 10:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(((observed - wanted) ** 2 / wanted).sum()), max(len(wanted) - 1, 1)


def chi_square_bound(freedom):
    """Return what the statistic exceeds with a probability of about 1e-5 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.26 * (2 / (9 * freedom)) ** 0.5) ** 3
