"""How many operations the matrix products need: what torch.utils.flop_counter shows.

    with FlopCounterMode() as counter:      a pair is a query and a key that it may read
        layer(x).sum().backward()           forward: q k', p v
                                            backward: q k' again, do v', and dq, dk, dv
Multiplications and additions, for pairs that the masks let through: tiles do more (benchmarks'
roofline counts those).
"""

from collections.abc import Iterable

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.visible_keys import Keys, count_keys

Shape = tuple[int, ...]
ONE_TOKEN = 1, 1  # l and d of raw keys


def pairs_of_a_run(length: int, start: int, S: int, keys: Keys) -> int:
    """Queries times the keys that each may read, in a run of S keys."""
    queries = range(start, start + length)
    seen = sum(count_keys(t, S, keys) for t in queries)
    if keys.window is None:
        return seen
    return seen - sum(count_keys(t - keys.window, S, keys) for t in queries)


def pairs_of_blocks(length: int, start: int, num_selected: int, select_block_size: int) -> int:
    """The same for selected blocks: as many as have begun, n at most, the query's own cut short."""

    def read(t: int) -> int:
        whole_blocks = min(num_selected, t // select_block_size + 1) - 1
        return whole_blocks * select_block_size + t % select_block_size + 1

    return sum(read(t) for t in range(start, start + length))


def products(q: Shape, v: Shape, pairs: int, *, forward: bool) -> int:
    """Operations of an attention with so many pairs, or of its gradient."""
    batch, heads, _, width = q
    value = v[-1]
    columns = width + value if forward else 3 * width + 2 * value
    return 2 * batch * heads * pairs * columns


def of_a_run(q: Shape, k: Shape, v: Shape, sizes: Iterable, *, forward: bool) -> int:
    """attend_to_keys: `sizes` are l, d, w, the scale and start."""
    block_size, stride, window, _, start = sizes
    pairs = pairs_of_a_run(q[2], start, k[2], Keys(block_size, stride, window))
    return products(q, v, pairs, forward=forward)


def of_blocks(q: Shape, v: Shape, ids: Shape, size: int, start: int, *, forward: bool) -> int:
    """attend_to_blocks, for blocks as select_blocks gives them."""
    return products(q, v, pairs_of_blocks(q[2], start, ids[3], size), forward=forward)


def of_branches(q: Shape, pairs: list[Shape], ids: Shape, plan: list[int], *, forward: bool) -> int:
    """attend_to_branches: its forward has no compressed branch, its backward has all three."""
    k_c, v_c, _, v_s, k_w, v_w = pairs
    block_size, stride, select_block_size, window, start = plan
    count = of_blocks(q, v_s, ids, select_block_size, start, forward=forward)
    count += of_a_run(q, k_w, v_w, (*ONE_TOKEN, window, None, start), forward=forward)
    if not forward:
        count += of_a_run(q, k_c, v_c, (block_size, stride, None, None, start), forward=False)
    return count


operations = torch.ops.nsa


@register_flop_formula(operations.attend_to_keys)
def _(q, k, v, *sizes, **_):
    return of_a_run(q, k, v, sizes, forward=True)


@register_flop_formula(operations.attend_to_keys_backward)
def _(q, k, v, _out, _lse, _dout, _dlse, *sizes, **_):
    return of_a_run(q, k, v, sizes, forward=False)


@register_flop_formula(operations.attend_to_blocks)
def _(q, _k, v, ids, size, _scale, start, **_):
    return of_blocks(q, v, ids, size, start, forward=True)


@register_flop_formula(operations.attend_to_blocks_backward)
def _(q, _k, v, ids, _out, _lse, _entries, _counts, _dout, size, _scale, start, **_):
    return of_blocks(q, v, ids, size, start, forward=False)


@register_flop_formula(operations.choose_blocks)
def _(q, k, _lse, block_size, stride, *sizes, **_):
    pairs = pairs_of_a_run(q[2], sizes[-1], k[2], Keys(block_size, stride, None))
    return 2 * q[0] * q[1] * pairs * q[3]  # q k' once more


@register_flop_formula(operations.attend_to_branches)
def _(q, _gates, pairs, _compressed, ids, plan, _scale, **_):
    return of_branches(q, pairs, ids, plan, forward=True)


@register_flop_formula(operations.attend_to_branches_backward)
def _(q, _gates, pairs, _outputs, ids, _shared, _dout, plan, _scale, **_):
    return of_branches(q, pairs, ids, plan, forward=False)
