"""Which of the waiting pairs fill what is left of a row best."""

from collections.abc import Sequence


__all__ = ["best_fill", "fill_within"]

_SHARES = 32


def fill_within(
    lengths: Sequence[int], units: Sequence[int], room: tuple[int, int], most: int
) -> list[int]:
    """Return the items of the best fill of ``room``: places, and units of patches."""
    chosen = best_fill(lengths, room[0], most)
    if sum(units[i] for i in chosen) <= room[1]:
        return chosen
    # Units are rounded up to shares of what there is room for, so that few sums are
    # told apart; places are as exact as ever.
    share = -(-room[1] // _SHARES) or 1
    costs = [-(-size // share) for size in units]
    return best_fill(lengths, room[0], most, costs=costs, budget=room[1] // share)


def best_fill(
    lengths: Sequence[int],
    capacity: int,
    most: int,
    *,
    costs: Sequence[int] | None = None,
    budget: int = 0,
) -> list[int]:
    """Return the items whose lengths sum to as much of the capacity as possible.

    ``lengths`` ascend. Bit n of a set says that the sum n can be reached with the items
    so far; a sum of costs k, at most the budget, has bits of its own, from k times
    ``stride`` on. More than ``most`` items are avoided by leaving out the shortest.
    """
    if costs is None:
        costs = [0] * len(lengths)
    stride = 2 * capacity + 1  # no sum of two reaches into the next one's bits
    places = (1 << (capacity + 1)) - 1
    full = sum(places << k * stride for k in range(budget + 1))
    whole = sum(1 << k * stride + capacity for k in range(budget + 1))
    reachable = [1]
    # Longest first, so that a fill made of few items is found before one of many.
    fitting = [
        i
        for i in reversed(range(len(lengths)))
        if lengths[i] <= capacity and costs[i] <= budget
    ]
    for i in fitting:
        moved = reachable[-1] << costs[i] * stride + lengths[i]
        reachable.append((reachable[-1] | moved) & full)
        if reachable[-1] & whole:
            break
    sums = [reachable[-1] >> k * stride & places for k in range(budget + 1)]
    cost = max(range(budget + 1), key=lambda k: sums[k].bit_length())
    rest = cost * stride + sums[cost].bit_length() - 1
    chosen = []
    for step in range(len(reachable) - 1, 0, -1):
        if not reachable[step - 1] >> rest & 1:
            item = fitting[step - 1]
            chosen.append(item)
            rest -= costs[item] * stride + lengths[item]
    chosen.sort(key=lambda i: lengths[i], reverse=True)
    return chosen[:most]
