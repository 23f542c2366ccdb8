"""Set 07's mistakes: the right kernel of each exercise, with one step changed by its FLAW.

FLAW is the mistake's name, and the compiler sees it: of each `if` one way is left. The lists are
the mistakes that a check knows by what they give; answers.py plants other flaws of the same
kernels, which a check finds in the memory around.
"""

import kernels  # noqa: F401  before triton: without a GPU it turns the interpreter on

# isort: split
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from exercises.records import Mistake
from kernels.online_softmax import LOG2E, finish, fold_in
from kernels.rows import load_rows, store_rows


def flaws(answer: Callable[[str], Callable], says: dict[str, str]) -> list[Mistake]:
    """A record for each flaw: its name, the launcher answer(name), and its sentence."""
    return [Mistake(name, answer(name), sentence) for name, sentence in says.items()]


# --- 07.1: a vector ---


@triton.jit
def add_kernel(x, y, out, a, size, BLOCK: tl.constexpr, FLAW: tl.constexpr):
    """a x + y in the places of this program. Tiles: [BLOCK]."""
    place = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + place
    if FLAW == "program number not used":
        at = place
    elif FLAW == "programs one place apart":
        at = tl.program_id(0) + place
    mask = places_that_exist(at, place, size, FLAW)
    x_tile = tl.load(x + at, mask=mask, other=0.0)
    y_tile = tl.load(y + at, mask=mask, other=0.0)
    if FLAW == "no mask at the store":
        mask = place >= 0
    to = y if FLAW == "written into y" else out
    tl.store(to + at, scaled_sum(a, x_tile, y_tile, FLAW), mask=mask)


@triton.jit
def places_that_exist(at, place, size, FLAW: tl.constexpr):
    """The mask [BLOCK] of the places before the end."""
    mask = at < size
    if FLAW == "mask one too long":
        mask = at <= size
    elif FLAW == "mask on the place in the block":
        mask = place < size
    elif FLAW == "last number left out":
        mask = at < size - 1
    return mask


@triton.jit
def scaled_sum(a, x, y, FLAW: tl.constexpr):
    """The numbers to write: a x + y."""
    value = a * x + y
    if FLAW == "a times the sum":
        value = a * (x + y)
    elif FLAW == "a times y":
        value = x + a * y
    elif FLAW == "y left out":
        value = a * x
    elif FLAW == "a left out":
        value = x + y
    return value


def launch_add(kernel, **flaw) -> Callable:
    """A kernel of 07.1 as an answer."""

    def scaled_add(x, y, out, a, block):
        grid = (triton.cdiv(len(x), block),)
        kernel[grid](x, y, out, a, len(x), BLOCK=block, **flaw)

    scaled_add.__name__ = kernel.__name__
    return scaled_add


def add(flaw: str) -> Callable:
    """07.1 with this flaw."""
    return launch_add(add_kernel, FLAW=flaw)


ADD = flaws(
    add,
    {
        "a times the sum": "a multiplied the sum, and it belongs to x only",
        "a times y": "a multiplied y, and it belongs to x",
        "y left out": "y was not added",
        "a left out": "x was not multiplied by a",
    },
)

# --- 07.2: a row ---


@triton.jit
def softmax_kernel(
    s,
    seen,
    out,
    s_row,
    out_row,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    FLAW: tl.constexpr,
):
    """The softmax of one row over its first seen[row] numbers. Tiles: [PADDED]."""
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    mask = column < usable(tl.load(seen + row), WIDTH, FLAW)
    between = s_row
    if FLAW == "stride of the rows ignored":
        between = WIDTH
    elif FLAW == "rows of s as far apart as those of out":
        between = out_row
    at = s + column + row * between
    if FLAW == "no mask at the load":
        x = tl.load(at)
    elif FLAW == "masked after the load":
        x = tl.where(mask, tl.load(at), -float("inf"))
    elif FLAW == "-inf added":
        x = tl.load(at, mask=column < WIDTH, other=0.0) + tl.where(mask, 0.0, -float("inf"))
    else:
        hidden = 0.0 if FLAW == "0 for masked scores" else -float("inf")
        x = tl.load(at, mask=mask, other=hidden)
    p = softmax_of(x, scale, FLAW)
    if FLAW == "0 for masked scores":
        p = tl.where(mask, p, 0.0)
    end = PADDED if FLAW == "no mask at the store" else WIDTH
    to = row * s_row if FLAW == "rows of out as far apart as those of s" else row * out_row
    tl.store(out + to + column, p, mask=column < end)


@triton.jit
def usable(count, WIDTH: tl.constexpr, FLAW: tl.constexpr):
    """How many numbers the row may use."""
    if FLAW == "count ignored":
        count = WIDTH
    elif FLAW == "last allowed number left out":
        count = count - 1
    return count


@triton.jit
def softmax_of(x, scale, FLAW: tl.constexpr):
    """The softmax of scale x, a tile [PADDED]; 0 where all of it is -inf."""
    scaled = x if FLAW == "no scale" else x * scale
    top = tl.max(x if FLAW == "unscaled maximum" else scaled, 0)
    top = other_top(scaled, top, FLAW)
    if FLAW != "empty row":
        top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(scaled - top) if FLAW == "exp2 for exp" else tl.exp(scaled - top)
    total = tl.sum(p, 0)
    if FLAW == "not divided":
        total = 1.0
    elif FLAW != "empty row":
        total = tl.where(total > 0, total, 1.0)
    return p / total


@triton.jit
def other_top(scaled, top, FLAW: tl.constexpr):
    """Another number in the place of the largest."""
    if FLAW == "no maximum":
        top = 0.0
    elif FLAW == "maximum from 0 on":
        top = tl.maximum(top, 0.0)
    elif FLAW == "maximum from -10000 on":
        top = tl.maximum(top, -1e4)
    elif FLAW == "the smallest":
        top = tl.min(tl.where(scaled == -float("inf"), float("inf"), scaled), 0)
    elif FLAW == "the largest size":
        top = tl.max(tl.where(scaled == -float("inf"), 0.0, tl.abs(scaled)), 0)
    elif FLAW == "the first one":
        top = tl.sum(tl.where(tl.arange(0, scaled.shape[0]) == 0, scaled, 0.0), 0)
    return top


def launch_softmax(kernel, **flaw) -> Callable:
    """A kernel of 07.2 as an answer."""

    def masked_softmax(s, seen, out, scale):
        rows, width = s.shape
        sizes = dict(WIDTH=width, PADDED=triton.next_power_of_2(width))
        kernel[(rows,)](s, seen, out, s.stride(0), out.stride(0), scale, **sizes, **flaw)

    masked_softmax.__name__ = kernel.__name__
    return masked_softmax


def softmax(flaw: str) -> Callable:
    """07.2 with this flaw."""
    return launch_softmax(softmax_kernel, FLAW=flaw)


SOFTMAX = flaws(
    softmax,
    {
        "0 for masked scores": (
            "0 stands in the place of numbers that may not be used, and takes part in the sum"
        ),
        "last allowed number left out": "the last number that the row may use was left out",
        "exp2 for exp": "the weights are those of another base: exp(x) is not exp2(x)",
        "no scale": "the scores were not multiplied by scale",
        "not divided": "the weights were not divided by their sum",
    },
)

# --- 07.3: tiles of queries and keys ---


@triton.jit
def flash_kernel(
    q,
    k,
    v,
    out,
    T,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    FLAW: tl.constexpr,
):
    """Causal attention of M queries. Tiles: q [M, D], k [N, D], v [N, DV], acc [M, DV]."""
    first_query = tl.program_id(0) * M
    query = first_query + tl.arange(0, M)
    mask = query < T
    q_tile = load_rows(q, query * D, mask, D, D)
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for first in range(0, end_of_walk(first_query, T, M, N, FLAW), N):
        key = first + tl.arange(0, N)
        inside = key < (T + N if FLAW == "no mask on keys and values" else T)
        k_tile = load_rows(k, key * D, inside, D, D)
        v_tile = load_rows(v, key * DV, inside, DV, DV)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [M, N]
        s = tl.where(visible(key[None, :], query[:, None], T, FLAW), s, hidden_score(scale, FLAW))
        m_i, l_i, acc = fold_tile(s, v_tile, scale, m_i, l_i, acc, FLAW)
    if FLAW != "not divided":
        acc = acc / l_i[:, None]
    if FLAW == "no mask at the store":
        mask = query >= 0
    store_rows(out, query * DV, acc, mask, DV, DV)


@triton.jit
def end_of_walk(first_query, T, M: tl.constexpr, N: tl.constexpr, FLAW: tl.constexpr):
    """The first key that no query of the program may read."""
    end = tl.minimum(first_query + M, T)
    if FLAW == "tiles after the last query loaded":
        end = T
    elif FLAW == "own tile left out":
        end = first_query
    elif FLAW == "as many tiles as programs":
        end = first_query // M * N + N
    elif FLAW == "last tile left out":
        end = (first_query + M - 1) // N * N
    return end


@triton.jit
def visible(key, query, T, FLAW: tl.constexpr):
    """The mask [M, N] of the keys that a query may read."""
    mask = key <= query
    if FLAW == "not causal":
        mask = (key < T) & (query >= 0)
    elif FLAW == "strictly before the query":
        mask = key < query
    elif FLAW == "one token ahead":
        mask = key <= query + 1
    return mask


@triton.jit
def hidden_score(scale, FLAW: tl.constexpr):
    """What stands for the score of a key that a query may not read, before the scale."""
    value = -float("inf")
    if FLAW == "-100 for masked scores":
        value = -100.0 / scale
    elif FLAW == "-10000 for masked scores":
        value = -1e4 / scale
    return value


@triton.jit
def fold_tile(s, v, scale, m_i, l_i, acc, FLAW: tl.constexpr):
    """One step of the online softmax in base e; s [M, N] is not scaled yet."""
    scaled = s if FLAW == "no scale" else s * scale
    m_new = tl.maximum(m_i, tl.max(s if FLAW == "unscaled maximum" else scaled, 1))
    if FLAW == "no maximum":
        m_new = tl.zeros_like(m_i)
    elif FLAW == "maximum from 0 on":
        m_new = tl.maximum(m_new, 0.0)
    elif FLAW == "maximum of the newest tile":
        m_new = tl.max(scaled, 1)
    elif FLAW == "one maximum for all queries":
        m_new = tl.zeros_like(m_i) + tl.max(m_new, 0)
    p = tl.exp(scaled - m_new[:, None])
    alpha = tl.exp(m_i - m_new)
    if FLAW == "exp2 for exp":
        p = tl.exp2(scaled - m_new[:, None])
    if FLAW == "exp2 for exp" or FLAW == "shrunk in base 2, weights in base e":
        alpha = tl.exp2(m_i - m_new)
    if FLAW != "l_i not shrunk" and FLAW != "neither shrunk":
        l_i = l_i * alpha
    if FLAW != "acc not shrunk" and FLAW != "neither shrunk":
        acc = acc * alpha[:, None]
    return m_new, l_i + tl.sum(p, 1), tl.dot(p, v, acc, input_precision="ieee")


def launch_flash(kernel, **flaw) -> Callable:
    """A kernel of 07.3 as an answer."""

    def flash_attention(q, k, v, out, scale, M, N):
        sizes = dict(D=q.shape[1], DV=v.shape[1], M=M, N=N)
        kernel[(triton.cdiv(len(q), M),)](q, k, v, out, len(q), scale, **sizes, **flaw)

    flash_attention.__name__ = kernel.__name__
    return flash_attention


def flash(flaw: str) -> Callable:
    """07.3 with this flaw."""
    return launch_flash(flash_kernel, FLAW=flaw)


FLASH = flaws(
    flash,
    {
        "not causal": "query 0 reads all {count} keys, and {after} of them come after it",
        "one token ahead": "query 0 reads key 1, which comes after it",
        "no scale": "the scores were not multiplied by scale",
        "exp2 for exp": "the weights are those of another base: exp(x) is not exp2(x)",
        "acc not shrunk": "acc was not made smaller when a tile brought a larger maximum",
        "l_i not shrunk": "l_i was not made smaller when a tile brought a larger maximum",
        "neither shrunk": "acc and l_i were not made smaller when a tile brought a larger maximum",
        "shrunk in base 2, weights in base e": (
            "acc and l_i were made smaller in base 2, and the weights are in base e"
        ),
        "not divided": "acc was not divided by l_i",
    },
)
WALKS = flaws(  # {query} is the first wrong one: it lacks itself
    flash,
    {
        "own tile left out": (
            "query {query} does not read key {query}: the walk ends before the program's own "
            "queries"
        ),
        "as many tiles as programs": (
            "query {query} does not read key {query}: the walk takes as many tiles of keys as "
            "there are tiles of queries"
        ),
    },
)

# --- 07.4: chosen blocks ---


@triton.jit
def selected_kernel(
    q,
    k,
    v,
    ids,
    out,
    T,
    S,
    start,
    scale,
    n,
    R: tl.constexpr,
    D: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
    FLAW: tl.constexpr,
):
    """Attention of one query's R heads to its blocks. Tiles: q, acc [R, D], k, v [l', D]."""
    i = tl.program_id(0)
    t = i if FLAW == "start forgotten" else start + i
    head = tl.arange(0, R)
    rows = (head * T + i) * D
    q_tile = load_rows(q, head * 0 + i * D if FLAW == "one head for all" else rows, head < R, D, D)
    m_i = tl.full([R], -float("inf"), tl.float32)
    l_i = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for step in range(number_of_blocks(n, t, SELECT_BLOCK_SIZE, FLAW)):
        j = chosen_block(ids, i, n, step, FLAW)
        key = first_key(j, SELECT_BLOCK_SIZE, FLAW) + tl.arange(0, SELECT_BLOCK_SIZE)
        end = S + SELECT_BLOCK_SIZE if FLAW == "no mask at the end of the keys" else S
        loaded = (key < end) & ((j >= 0) | reads_padding(FLAW))
        k_tile = load_rows(k, key * D, loaded, D, D)
        v_tile = load_rows(v, key * D, loaded, D, D)
        mask = may_read(key, t, S, j, FLAW)[None, :]
        factor = in_base_2(scale, FLAW)
        m_i, l_i, acc = fold_in(q_tile, k_tile, v_tile, mask, factor, m_i, l_i, acc)
    if FLAW == "divided by 0":
        acc = acc / l_i[:, None]
    else:
        acc, _ = finish(m_i, l_i, acc)
    store_rows(out, rows, acc, head < R, D, D)


@triton.jit
def reads_padding(FLAW: tl.constexpr):
    """Whether keys and values are loaded for -1."""
    return FLAW == "-1 read before it is masked" or FLAW == "-1 clamped, not masked"


@triton.jit
def number_of_blocks(n, t, SELECT_BLOCK_SIZE: tl.constexpr, FLAW: tl.constexpr):
    """How many blocks the query at t reads."""
    steps = n
    if FLAW == "last id left out":
        steps = n - 1
    elif FLAW == "ids ignored":
        steps = t // SELECT_BLOCK_SIZE + 1
    return steps


@triton.jit
def chosen_block(ids, i, n, step, FLAW: tl.constexpr):
    """An id of query i."""
    if FLAW == "ids ignored":
        j = step
    elif FLAW == "ids of query 0 for all":
        j = tl.load(ids + step)
    else:
        j = tl.load(ids + i * n + step)
    return j


@triton.jit
def first_key(j, SELECT_BLOCK_SIZE: tl.constexpr, FLAW: tl.constexpr):
    """Where block j begins; padding is read at block 0, and masked."""
    block = j if FLAW == "-1 read before it is masked" else tl.maximum(j, 0)
    return block if FLAW == "ids read as tokens" else block * SELECT_BLOCK_SIZE


@triton.jit
def may_read(key, t, S, j, FLAW: tl.constexpr):
    """The mask [l'] of the keys of block j that the query at t may read."""
    mask = key <= t
    if FLAW == "not causal in the own block":
        mask = key < S
    elif FLAW == "does not read itself":
        mask = key < t
    elif FLAW == "one token ahead":
        mask = key <= t + 1
    if FLAW != "-1 clamped, not masked":
        mask = mask & (j >= 0)
    return mask


@triton.jit
def in_base_2(scale, FLAW: tl.constexpr):
    """The factor of the scores for fold_in."""
    factor = scale * LOG2E
    if FLAW == "log2(e) forgotten":
        factor = scale
    elif FLAW == "no scale":
        factor = LOG2E
    return factor


def launch_selected(kernel, **flaw) -> Callable:
    """A kernel of 07.4 as an answer."""

    def selected_attention(q, k, v, ids, out, start, scale, select_block_size):
        R, T, D = q.shape
        sizes = dict(R=R, D=D, SELECT_BLOCK_SIZE=select_block_size)
        kernel[(T,)](q, k, v, ids, out, T, len(k), start, scale, ids.shape[1], **sizes, **flaw)

    selected_attention.__name__ = kernel.__name__
    return selected_attention


def selected(flaw: str) -> Callable:
    """07.4 with this flaw."""
    return launch_selected(selected_kernel, FLAW=flaw)


SELECTED = flaws(
    selected,
    {
        "not causal in the own block": (
            "query 0 is token {start}, and reads to the end of its own block"
        ),
        "one token ahead": "query 0 is token {start}, and reads token {next}",
        "does not read itself": "query 0 is token {start}, and does not read itself",
        "start forgotten": "query 0 is token {start}, and was taken for token 0",
        "-1 clamped, not masked": "-1 is padding, and was read as block 0",
        "ids read as tokens": "ids are blocks, and were read as tokens",
        "log2(e) forgotten": (
            "the weights are those of another base: fold_in counts in powers of 2"
        ),
        "no scale": "the scores were not multiplied by scale",
        "one head for all": "all heads got the output of head 0",
        "ids of query 0 for all": "every query read the ids of query 0",
        "ids ignored": "every token up to the query was read, chosen or not",
    },
)
# Known where there are two ids or more: of one id nothing would be left, an output of 0.
LAST_ID = Mistake(
    "last id left out", selected("last id left out"), "the walk ends one id too early"
)

# --- 07.5: the union of neighbours ---


def union(
    real=lambda j: j >= 0,
    bit=lambda u, slot, count: 1 << u,
    join=lambda bits, bit: bits | bit,
    entry=lambda j, bits: 16 * j + bits,
    order=list,
    rows=lambda ids: ids,
) -> Callable:
    """The entries of all tokens, in order of first appearance; count is the number of tokens."""

    def answer(ids: Tensor) -> list[int]:
        who = {}
        chosen = rows(ids.tolist())
        for u, row in enumerate(chosen):
            for slot, j in enumerate(row):
                if real(j):
                    who[j] = join(who.get(j, 0), bit(u, slot, len(chosen)))
        return [entry(j, who[j]) for j in order(who)]

    return answer


def each_time(ids: Tensor) -> list[int]:
    """An entry for each id, not for each block."""
    rows = enumerate(ids.tolist())
    return [16 * j + (1 << u) for u, row in rows for j in row if j >= 0]


def chosen_by_all(ids: Tensor) -> list[int]:
    """Only blocks that every token chose."""
    full = (1 << len(ids)) - 1
    return [entry for entry in union()(ids) if entry % 16 == full]


UNIONS = [
    Mistake("padding listed", union(real=lambda j: True), "-1 is padding, and has an entry"),
    Mistake(
        "bits from the left",
        union(bit=lambda u, slot, count: 1 << (count - 1 - u)),
        "the bits run from the last token to the first: bit u belongs to token u",
    ),
    Mistake(
        "bits of four tokens from the left",
        union(bit=lambda u, slot, count: 8 >> u),
        "token 0 has the bit 8: bit u is worth 2 to the power u",
    ),
    Mistake(
        "bits of the places",
        union(bit=lambda u, slot, count: 1 << slot),
        "a bit says in which place of its list the block stands, and was to say who chose it",
    ),
    Mistake(
        "who chose it first",
        union(join=lambda bits, bit: bits or bit),
        "only the token that chose a block first has its bit",
    ),
    Mistake(
        "who chose it last",
        union(join=lambda bits, bit: bit),
        "only the token that chose a block last has its bit",
    ),
    Mistake(
        "tokens counted",
        union(bit=lambda u, slot, count: 1, join=lambda bits, bit: bits + bit),
        "the tokens are counted, and each was to have a bit of its own",
    ),
    Mistake(
        "numbers of the tokens added",
        union(bit=lambda u, slot, count: u, join=lambda bits, bit: bits + bit),
        "the tokens' numbers are added, and token u has the bit 2 to the power u",
    ),
    Mistake("no bits", union(entry=lambda j, bits: 16 * j), "the bits are left out"),
    Mistake("blocks alone", union(entry=lambda j, bits: j), "these are the blocks, without bits"),
    Mistake(
        "block in the low bits",
        union(entry=lambda j, bits: 16 * bits + j),
        "the bits stand above the block, and were asked for below it",
    ),
    Mistake(
        "in order of the blocks",
        union(order=sorted),
        "the entries stand in order of the blocks, not of their first appearance",
    ),
    Mistake(
        "place by place",
        lambda ids: [
            next(entry for entry in union()(ids) if entry // 16 == j)
            for j in dict.fromkeys(ids.T.flatten().tolist())
            if j >= 0
        ],
        "the ids were walked through place by place, not token by token",
    ),
    Mistake(
        "backwards",
        union(order=lambda who: list(who)[::-1]),
        "the entries stand from the last that appears to the first",
    ),
    Mistake("an entry each time", each_time, "a block has an entry for each token that chose it"),
    Mistake("chosen by all", chosen_by_all, "only blocks that all tokens chose are listed"),
    Mistake(
        "token 0 alone",
        union(rows=lambda rows: rows[:1]),
        "only the blocks of token 0 are listed",
    ),
]
