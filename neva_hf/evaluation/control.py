"""Control: what a dial does to its own value. Margin shifts, control success rate, choices between two values.

Functions of ([`Tables`], weights `[B, n]`), see tables.py. With one target they give that target's numbers, with several
the mean over them.
"""

from __future__ import annotations

import numpy as np

from .tables import Tables, over, pairs_of, present_mean, weighted, weighted_sum


def target_shifts(one: Tables, weights: np.ndarray) -> np.ndarray:
    """The shift of each target's own margin (DESIGN section 2).

    `shift(t) = mean over scenarios of margin_t(dialled) - margin_t(0)`, with `margin_t` the log-probability per token of
    t's reply minus the mean of the other replies'.

    Args:
        one ([`Tables`]): By scenario.
        weights (`np.ndarray`): `[B, n]`.

    Returns:
        `np.ndarray`: `[B, T]`, nats per token; positive is the way that was dialled.
    """
    return weighted(weights, one.shifts)[:, range(len(one.targets)), one.own]


def target(one: Tables, weights: np.ndarray) -> np.ndarray:
    """Control: the mean over targets of the shift of their own margin, `[B]`."""
    return target_shifts(one, weights).mean(1)


def success_rates(one: Tables, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Control success rate (CSR) by the `choice` judge, before and after, of every observed value under every target.

    `CSR(u) = choices that u's reply wins / choices that it takes part in`, over all scenarios and all rivals in them. A
    choice is between u's reply and one other value's reply to the same question (for single traits: the opposing reply);
    the one with the higher log-probability per token wins. No other model judges. For u other than the target, choices
    against the target's reply do not count.

    Args:
        one ([`Tables`]): By scenario.
        weights (`np.ndarray`): `[B, n]`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Before and after, `[B, T, U]` each, 0 to 1.
    """
    faced = weighted_sum(weights, one.faced)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weighted_sum(weights, one.won_before) / faced, weighted_sum(weights, one.won_after) / faced


def csr(one: Tables, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over targets of their own control success rate, before and after, `[B]` each."""
    before, after = (rate[:, range(len(one.targets)), one.own] for rate in success_rates(one, weights))
    return before.mean(1), after.mean(1)


def csr_shifts(one: Tables, weights: np.ndarray) -> np.ndarray:
    """The change of every observed value's CSR, `[B, T, U]`; turned round for negative strengths, as margins are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        # (one difference of counts, so that nothing won is exactly 0)
        return one.sign * weighted_sum(weights, one.won_after - one.won_before) / weighted_sum(weights, one.faced)


def csr_change(one: Tables, weights: np.ndarray) -> np.ndarray:
    """The mean over targets of the change of their own CSR, `[B]`; positive is the way that was dialled."""
    return csr_shifts(one, weights)[:, range(len(one.targets)), one.own].mean(1)


def choice_shares(one: Tables, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who wins between every two values: the share of scenarios in which the first one's reply is likelier.

    Args:
        one ([`Tables`]): By scenario.
        weights (`np.ndarray`): `[B, n]`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Before, `[B, P]`, and with each target dialled, `[B, T, P]`.
    """
    return weighted(weights, one.first_before), weighted(weights, one.first_after)


def choice_moves(one: Tables, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far choices between two values move, where the target takes part and where it does not.

    `own`: the mean, over the pairs that the target is in, of the move of its log-probability minus the other one's.
    `other`: the mean, over the pairs that it is not in, of the absolute value of the mean move over scenarios (so that what
    differs from scenario to scenario cancels).

    Args:
        one ([`Tables`]): By scenario.
        weights (`np.ndarray`): `[B, n]`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Own and other, `[B]` each, nats per token; NaN without such pairs.
    """
    means = weighted(weights, one.moves)
    own, other = [], []
    for row, column in enumerate(one.own):
        for place, (first, second) in enumerate(pairs_of(one.observed)):
            if column in (first, second):
                own.append(means[:, row, place] * (1 if column == first else -1))
            else:
                other.append(np.abs(means[:, row, place]))
    nothing = np.full((1, len(weights)), np.nan)
    return present_mean(np.array(own or nothing), 0), present_mean(np.array(other or nothing), 0)


def own_over_other(one: Tables, weights: np.ndarray) -> np.ndarray:
    """Specificity: `own / other` of [`choice_moves`], `[B]`; 1 is an edit that moves all choices alike."""
    own, other = choice_moves(one, weights)
    return over(own, other)
