"""Set 09, decoding: finished blocks, a cache that grows, parts of a softmax, bytes, one reading."""

import functools

import torch
from torch import Tensor

from exercises.compare import close, form, matches, name_mistake
from exercises.memory import tracing
from exercises.records import Case, Exercise, in_turn
from nsa_lite.blocks import overlap_in_strides
from nsa_lite.config import NSAConfig

from . import mistakes, watching

# --- 09.1 ---

LENGTHS = {
    "a stride that does not divide the block": dict(first=0, block_size=10, stride=4),
    "blocks side by side": dict(first=0, block_size=5, stride=5),
    "blocks of three strides": dict(first=0, block_size=6, stride=2),
    "the paper's sizes": dict(first=65_500, block_size=32, stride=16),
}


def blocks_case(generator, name, first, block_size, stride) -> Case:
    """40 lengths, one after the other, and the blocks of each by looking."""
    lengths = list(range(first, first + 40))
    arguments = dict(lengths=lengths, block_size=block_size, stride=stride)
    expected = [count_ends(length, block_size, stride) for length in lengths]
    return Case(name, arguments, expected, explain=explain_blocks, call=for_each_length)


def count_ends(length: int, block_size: int, stride: int) -> int:
    """Go from block to block, and count those whose last token is there."""
    return sum(start + block_size <= length for start in range(0, length, stride))


def for_each_length(answer, lengths, block_size, stride):
    """The answer's number for each length."""
    return [answer(length, block_size, stride) for length in lengths]


def explain_blocks(got, expected, lengths, block_size, stride):
    """A known mistake, or a block that is wrongly counted or left out."""
    if form(got, expected) or any(form(*pair) for pair in zip(got, expected, strict=True)):
        return None
    said = name_mistake(got, mistakes.BLOCKS, (lengths, block_size, stride), call=for_each_length)
    if said:
        return said
    length, mine, right = next(
        row for row in zip(lengths, got, expected, strict=True) if row[1] != row[2]
    )
    sequence = f"a sequence of {length} tokens, blocks of {block_size} every {stride}"
    if mine < 0:
        return f"{sequence}: got {mine}, and nothing is counted below 0"
    block = min(mine, right)
    end = block * stride + block_size - 1
    if mine > right:
        return f"{sequence}: block {block} counts, and its last token would be token {end}"
    return f"{sequence}: block {block} does not count, and its last token is token {end}"


# --- 09.2 ---

FREE = torch.inf  # stands behind a sequence's length

GROWN = {
    "as many groups as new tokens": dict(lengths=[3, 0, 5], groups=2, count=2),
    "one new token": dict(lengths=[4, 7, 1, 2], groups=3, count=1, width=4),
    "several new tokens": dict(lengths=[0, 6, 3], groups=2, count=4),
    "equal lengths": dict(lengths=[5, 5], groups=3, count=2, width=5),
    "the last rows of the buffer": dict(lengths=[9, 2], groups=1, count=3),
    "one sequence of a larger memory": dict(lengths=[6], groups=2, count=3, gap=4),
    "a part of a larger memory": dict(lengths=[2, 8, 0, 3], groups=3, count=2, gap=5),
}


def grow_cases(generator: torch.Generator) -> list[Case]:
    """The tables above, and last what is made on the way in a large buffer."""
    large = dict(lengths=[40, 3, 290], groups=2, count=3, capacity=300)
    return [
        *in_turn(grow_case, GROWN)(generator),
        memory_case(grow_case(generator, "a large buffer", **large)),
    ]


def grow_case(generator, name, lengths, groups, count, width=3, capacity=12, gap=0) -> Case:
    """Random rows up to each length, inf behind; expected by copying row after row."""
    buffer = torch.full((len(lengths), groups, capacity, width), FREE)
    new = torch.randn(len(lengths), groups, count, width, generator=generator)
    for b, n in enumerate(lengths):
        buffer[b, :, :n] = torch.randn(groups, n, width, generator=generator)
    expected = buffer.clone()
    for b, n in enumerate(lengths):
        for i in range(count):
            expected[b, :, n + i] = new[b, :, i]
    lengths = torch.tensor(lengths)
    arguments = dict(buffer=buffer, new=new, lengths=lengths)
    axes = {"the new lengths": ("sequence",), "buffer": ("sequence", "group", "row", "channel")}
    call = functools.partial(written, gap=gap)
    return Case(name, arguments, (lengths + count, expected), axes, explain_growth, call)


def written(answer, buffer, new, lengths, gap=0):
    """The lengths that the answer returns, and the buffer as it left it."""
    given = in_larger_memory(buffer, gap)
    result = answer(given, new, lengths)
    return result, given.clone()


def in_larger_memory(buffer: Tensor, gap: int) -> Tensor:
    """A copy that is a part of a memory with `gap` more rows in each group."""
    batch, groups, capacity, width = buffer.shape
    memory = buffer.new_zeros(batch, groups, capacity + gap, width)
    part = memory[:, :, :capacity]
    return part.copy_(buffer)


def memory_case(case: Case) -> Case:
    """The same, and the largest tensor that is made on the way."""
    allowed = case.arguments["buffer"][0].numel() // 2
    axes = {**case.axes, "largest tensor": ()}
    call = functools.partial(with_largest, allowed=allowed)
    expected = (*case.expected, allowed)
    return Case(case.name, case.arguments, expected, axes, explain_growth, call)


def with_largest(answer, buffer, new, lengths, allowed):
    """As `written`, and the largest tensor that was made; the allowed size counts as none."""
    given = in_larger_memory(buffer, 0)
    with watching.LargestCopy(given) as mode:
        result = answer(given, new, lengths)
    return result, given.clone(), max(mode.size, allowed)


def explain_growth(got, expected, buffer, new, lengths):
    """Nothing written, a known mistake, the first wrong row, or a copy on the way."""
    arguments = (buffer, new, lengths)
    if not matches(got[1], expected[1]):
        if torch.equal(got[1], buffer):
            return "buffer is as it was: were the rows written into a copy of it?"
        said = name_mistake(
            got, mistakes.WRITES, arguments, call=written, part=lambda result: result[1]
        )
        return said or wrong_row(got[1], expected[1], lengths.tolist(), new.shape[2])
    if not matches(got[0], expected[0]):
        return name_mistake(
            got, mistakes.LENGTHS, arguments, call=written, part=lambda result: result[0]
        )
    return (
        f"the result is right, but {got[2]} numbers were made at once to write {new.numel()}: "
        "what a step costs must not grow with the capacity or with what is held"
    )


def wrong_row(got: Tensor, expected: Tensor, lengths: list[int], count: int) -> str:
    """What stands wrongly in the first wrong row."""
    wrong = ~close(got, expected).all(3)  # (B, G, capacity)
    b, g, row = wrong.nonzero()[0].tolist()
    where = f"row {row} of sequence {b}, group {g},"
    if row < lengths[b]:
        return f"{where} was changed, and it holds one of the first {lengths[b]} tokens"
    if row >= lengths[b] + count:
        return f"{where} was changed, and it lies behind the {count} new tokens"
    if got[b, g, row].isnan().any():
        return f"{where} is NaN: what stood there may be anything, and 0 times inf is NaN"
    return f"{where} does not hold the new token {row - lengths[b]}"


# --- 09.3 ---

PARTS = {
    "two parts": dict(sizes=(3, 5)),
    "five parts": dict(sizes=(2, 4, 1, 6, 3), rows=2, width=5),
    "one part": dict(sizes=(7,), rows=6, width=2),
    "equal scores": dict(sizes=(1, 4, 2), rows=5, scale=0.0),
    "large scores": dict(sizes=(4, 3, 5), shift=220.0),
    "very negative scores": dict(sizes=(5, 2), rows=4, width=2, shift=-220.0),
    "rows far apart": dict(sizes=(3, 3), width=4, apart=-160.0),
    "parts far apart": dict(sizes=(3, 2, 6), rows=2, width=5, between=[0.0, 160.0, 320.0]),
    "empty parts, with NaN in outs": dict(sizes=(4, 2, 3), rows=5, empty=[(0, 1), (2, 3), (0, 3)]),
    "an empty part, and very negative scores": dict(
        sizes=(2, 3), shift=-220.0, empty=[(1, 0)], filled=torch.inf
    ),
    "a row that saw nothing": dict(sizes=(2, 3), rows=6, empty=[(0, 2), (1, 2), (1, 4)]),
    "a number where nothing was seen": dict(
        sizes=(4, 1, 3), rows=2, width=5, empty=[(0, 1), (1, 1), (2, 1)], filled=7.0
    ),
}


def combine_case(
    generator, name, sizes, rows=3, width=4, empty=(), filled=torch.nan, **spread
) -> Case:
    """Keys in parts of these sizes; empty lists the (part, row) that saw none of them."""
    scores = random_scores(generator, rows, sizes, **spread)
    v = torch.randn(sum(sizes), width, generator=generator)
    in_parts = scores.split(sizes, 1)  # views
    for p, row in empty:
        in_parts[p][row] = -torch.inf
    parts = map(part_of_softmax, in_parts, v.split(sizes))
    outs, maxima, sums = (torch.stack(x) for x in zip(*parts, strict=True))
    outs[maxima == -torch.inf] = filled
    arguments = dict(outs=outs, maxima=maxima, sums=sums)
    return Case(name, arguments, whole_softmax(scores) @ v, ("row", "channel"), explain_combine)


def random_scores(generator, rows, sizes, scale=2.0, shift=0.0, apart=0.0, between=None) -> Tensor:
    """Scores of rows that lie `apart`, and of parts that are shifted by `between`."""
    scores = torch.randn(rows, sum(sizes), generator=generator) * scale + shift
    scores += apart * torch.arange(rows)[:, None]
    return scores + torch.tensor(between or [0.0] * len(sizes)).repeat_interleave(
        torch.tensor(sizes)
    )


def part_of_softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outs, maximum and sum of each row, in powers of 2."""
    m = scores.amax(1)
    p = torch.exp2((scores.double() - m[:, None]).nan_to_num(-torch.inf, neginf=-torch.inf))
    return (p @ v.double()).float(), m, p.sum(1).float()


def whole_softmax(scores: Tensor) -> Tensor:
    """Each row's softmax in powers of 2, by its definition, in double; 0 for an empty row."""
    rows = []
    for row in scores.double():
        seen = row > -torch.inf
        weights = torch.zeros_like(row)
        if seen.any():
            weights[seen] = torch.exp2(row[seen] - row[seen].max())
            weights /= weights.sum()
        rows.append(weights)
    return torch.stack(rows).float()


def explain_combine(got, expected, outs, maxima, sums):
    """A row that is not what it can be, or a known mistake."""
    for r, (row, m) in enumerate(zip(got, maxima.T, strict=True)):
        if said := impossible_row(row, m):
            return f"row {r}{said}"
    return name_mistake(got, mistakes.COMBINES, (outs, maxima, sums))


def impossible_row(row: Tensor, m: Tensor) -> str | None:
    """What no row may hold; m (P,) are its parts' maxima."""
    empty = (m == -torch.inf).nonzero().flatten().tolist()
    if len(empty) == len(m):
        if row.isnan().any():
            return " saw nothing in any part, and its output is NaN"
        return " saw nothing in any part, and its output is not 0" if row.any() else None
    if empty and row.isnan().any():
        return f" is NaN: it saw nothing in part {empty[0]}, and what stands there is no number"
    if empty and not row.any():
        return f" is 0: it saw nothing in part {empty[0]}, and something in others"
    seen = m[m > -torch.inf]
    if seen.abs().max() <= 100:
        return None
    first = "subtract the row's own largest maximum first"
    if not row.isfinite().all():
        return f" is not finite: exp2 of a large number is inf, of a very negative one 0; {first}"
    if not row.any():
        return f" is 0, and it has seen keys: exp2 of a very negative number is 0; {first}"
    return None


# --- 09.4 ---

SMALL = dict(heads=6, kv_heads=3, head_dim=10, value_dim=7, num_initial=0, num_local=1)
STEPS = {
    "small blocks": dict(
        length=203,
        number_bytes=4,
        sizes=dict(
            **SMALL, block_size=12, stride=3, select_block_size=15, num_selected=5, window=21
        ),
    ),
    "the paper's sizes": dict(length=1500, number_bytes=4, sizes={}),
    "the last token of a block": dict(length=65_536, number_bytes=2, sizes={}),
    "as many blocks as are chosen": dict(
        length=38,
        number_bytes=1,
        sizes=dict(
            **SMALL, block_size=10, stride=5, select_block_size=10, num_selected=4, window=30
        ),
    ),
    "fewer blocks than are chosen": dict(
        length=27,
        number_bytes=2,
        sizes=dict(
            **SMALL, block_size=6, stride=6, select_block_size=12, num_selected=4, window=20
        ),
    ),
    "a short window": dict(
        length=400,
        number_bytes=8,
        sizes=dict(
            heads=10,
            kv_heads=2,
            head_dim=12,
            value_dim=5,
            block_size=8,
            stride=4,
            num_selected=3,
            select_block_size=20,
            window=7,
        ),
    ),
    "fewer tokens than a window": dict(length=100, number_bytes=2, sizes={}),
    "fewer tokens than a block": dict(length=11, number_bytes=4, sizes={}),
    "one token": dict(length=1, number_bytes=2, sizes=SMALL),
}
BRANCHES = ("dense", "compressed", "selected", "window")


def step_case(generator, name, length, number_bytes, sizes) -> Case:
    """The bytes by looking at one token after another."""
    config = NSAConfig(**sizes)
    one = config.kv_heads * (config.head_dim + config.value_dim) * number_bytes
    expected = tuple(one * count for count in count_tokens(config, length))
    arguments = dict(config=config, length=length, number_bytes=number_bytes)
    return Case(name, arguments, expected, dict.fromkeys(BRANCHES, ()), explain_step)


def count_tokens(config: NSAConfig, length: int) -> tuple[int, int, int, int]:
    """The keys that the newest token reads: all, the compressed, the selected, the window's."""
    tokens = range(length)
    ends = [i * config.stride + config.block_size for i in tokens]
    blocks = sorted({t // config.select_block_size for t in tokens})
    chosen = {blocks[-1], *blocks[: config.num_selected - 1]}  # its own, and any others
    return (
        len(tokens),
        sum(end <= length for end in ends),
        sum(t // config.select_block_size in chosen for t in tokens),
        sum(length - 1 - t < config.window for t in tokens),
    )


def explain_step(got, expected, config, length, number_bytes):
    """A known mistake in all of them, or in the first that is wrong."""
    arguments = (config, length, number_bytes)
    if said := name_mistake(got, mistakes.BYTES, arguments):
        return f"{length} tokens: {said}"
    if sorted(got) == sorted(expected):
        return f"{length} tokens: the four numbers are right, and stand in another order"
    for n, branch in enumerate(BRANCHES):
        if not matches(got[n], expected[n]):
            said = name_mistake(got, mistakes.BYTES, arguments, part=lambda result, n=n: result[n])
            return said and f"{length} tokens, {branch}: {said}"
    return None


# --- 09.5 ---

READS = {
    "three shares": dict(sizes=(6, 9, 4)),
    "one share": dict(sizes=(11,), heads=2, width=5, l=4),
    "equal scores": dict(sizes=(7, 5, 3, 4), heads=3, scale=0.0),
    "large scores": dict(sizes=(5, 8, 7), heads=5, width=2, shift=220.0),
    "very negative scores": dict(sizes=(7, 5), heads=3, shift=-220.0, l=8),
    "heads far apart": dict(sizes=(5, 6, 7), heads=3, width=6, apart=-160.0),
    "shares far apart": dict(sizes=(6, 5, 7), heads=3, between=[0.0, 40.0, -300.0]),
    "keys that are not finished yet": dict(sizes=(6, 7, 5), heads=5, hidden=3),
    "a share that sees nothing": dict(sizes=(6, 5, 7), heads=3, width=5, hidden=9, l=4),
    "nothing is finished yet": dict(sizes=(5, 3), heads=2, hidden=8),
}


def read_cases(generator: torch.Generator) -> list[Case]:
    """Results, and last what is held of seven shares."""
    held = dict(sizes=(1600,) * 7, heads=3, width=5, l=4, select=1500)
    case = read_case(generator, "seven shares", **held)
    axes = {**case.axes, "times that a share is read": (), "shares that are still held": ()}
    expected = (*case.expected, 1, 0)
    last = Case(case.name, case.arguments, expected, axes, explain_reading, held_shares)
    return [*in_turn(read_case, READS)(generator), last]


def read_case(generator, name, sizes, heads=4, width=3, l=6, select=6, hidden=0, **spread) -> Case:
    """Keys in shares; the last `hidden` may not be read, and their values are NaN."""
    count = sum(sizes)
    scores = random_scores(generator, heads, sizes, **spread)
    scores[:, count - hidden :] = -torch.inf
    values = torch.randn(count, width, generator=generator)
    blocks = -(-(count * 2 + l) // select)
    overlap = overlap_in_strides(count, blocks, l, 2, select)
    p = whole_softmax(scores)
    expected = (p @ values, (p @ overlap).sum(0))
    values[count - hidden :] = torch.nan
    arguments = dict(
        scores=list(scores.split(sizes, 1)),
        values=list(values.split(sizes)),
        overlap=list(overlap.split(sizes)),
    )
    axes = {"out": ("head", "channel"), "scores": ("block",)}
    return Case(name, arguments, expected, axes, explain_reading, read_all)


def read_all(answer, *shares):
    """The answer's results."""
    read = watching.Reader(*shares)
    return answer(read, len(read.shares))


def held_shares(answer, *shares):
    """The answer's results, how often it read a share, and of how many it kept the numbers."""
    read = watching.Reader(*shares)
    several = range(1, len(read.shares) + 1)  # what was gathered is as large as several shares
    mode = watching.Held({x.numel() * n for x in read.shares[0][:2] for n in several})
    read.watch = mode.look
    with tracing(), mode:
        result = answer(read, len(read.shares))
    if not isinstance(result, tuple | list):
        return result
    return *result, read.often(), mode.shares_held()


def explain_reading(got, expected, scores, values, overlap):
    """Read twice or kept; else NaN, or a known mistake in the scores or else in out."""
    out, block_scores, *watched = got
    if matches((out, block_scores), expected[:2]):
        times, held = watched
        if times == 0:
            return "out and scores are right, and a share was never read"
        if times > 1:
            return f"out and scores are right, and a share was read {times} times"
        return (
            f"out and scores are right, and the scores or values of {held} shares are still held "
            "while later ones are read: keep sums over blocks"
        )
    if said := impossible_result(out, block_scores, scores):
        return said
    known = functools.partial(name_mistake, got, arguments=(scores, values, overlap), call=read_all)
    if not matches(block_scores, expected[1]):
        return known(mistakes.SCORES, part=lambda result: result[1])
    return known(mistakes.OUTPUTS, part=lambda result: result[0])


def impossible_result(out: Tensor, block_scores: Tensor, scores: list[Tensor]) -> str | None:
    """NaN or infinity, or something where no key may be read."""
    s = torch.cat(scores, 1)
    hidden = s[0] == -torch.inf
    dead = [p for p, part in enumerate(scores) if (part == -torch.inf).all()]
    both = {"out is": out, "scores are": block_scores}
    broken = next((f"{n} not finite" for n, x in both.items() if not x.isfinite().all()), None)
    if hidden.all():
        rest = "the result is not 0" if out.any() or block_scores.any() else None
        said = broken or rest
        return said and f"no key may be read, and {said}"
    if broken and dead:
        return f"{broken}: no key of share {dead[0]} may be read; is its -inf subtracted from -inf?"
    if broken and hidden.any():
        return f"{broken}: where a score is -inf the value may be NaN, and 0 times NaN is NaN"
    far = s[s > -torch.inf].abs().max() > 100
    why = ": exp2 of a large number is inf, of a very negative one 0; subtract a maximum first"
    if broken and len(scores) > 1 and not far:
        return f"{broken}: read uses the same memory again; was a share kept as it came?"
    if broken:
        return broken + (why if far else "")
    lost = far and not (out.any(1).all() and block_scores.any())
    return f"a head's result is 0{why}" if lost else None


EXERCISES = [
    Exercise(
        "09.1",
        "Finished blocks",
        "warm-up",
        5,
        in_turn(blocks_case, LENGTHS),
        hints=(
            "How long must a sequence be for block 0 to be finished? For block 1? For block i?",
            "Block i ends before token i d + l: it is finished when i d + l <= length. The largest "
            "such i, plus 1, and 0 if there is none.",
            "subtract the block's size from the length; divide by the stride, rounded down; add "
            "1; no less than 0",
        ),
    ),
    Exercise(
        "09.2",
        "A cache that grows in place",
        "core",
        15,
        grow_cases,
        hints=(
            "In which row does new token i of sequence b belong? How do you name one row for each "
            "sequence and token in a single assignment?",
            "row[b, i] = lengths[b] + i. buffer[b, :, row], with b (B, 1) and row (B, T), has the "
            "shape (B, T, G, width): the indexed axes come first.",
            "rows = lengths as a column + a row of 0 .. T - 1; numbers of the sequences as a "
            "column; assign new with groups and tokens exchanged; return lengths + T as a new "
            "tensor",
        ),
    ),
    Exercise(
        "09.3",
        "Combine the parts",
        "core",
        15,
        in_turn(combine_case, PARTS),
        hints=(
            "What must a part with maximum m be multiplied by, so that it stands relative to the "
            "row's largest maximum M?",
            "out = sum_p exp2(m_p - M) outs_p / sum_p exp2(m_p - M) sums_p. Where M is -inf, take "
            "0 in its place; what an empty part holds must not be multiplied, since 0 NaN is NaN.",
            "M = largest maximum over the parts, 0 where it is -inf; the weights; 0 for outs where "
            "the sum is 0; two weighted sums over the parts; divide, by 1 where the total is 0",
        ),
    ),
    Exercise(
        "09.4",
        "The bytes of a step",
        "core",
        15,
        in_turn(step_case, STEPS),
        hints=(
            "The newest token is token length - 1. In which block does it lie, and how much of it "
            "is there? How many blocks come before?",
            "selected tokens = (length - 1) mod l' + 1 + min(n - 1, floor((length - 1) / l')) l'. "
            "Each key read takes G (D + Dv) numbers, of whichever branch.",
            "bytes of one token; tokens of the four: all, finished blocks (09.1), own block and "
            "the others, at most w; multiply",
        ),
    ),
    Exercise(
        "09.5",
        "Read once",
        "stretch",
        40,
        read_cases,
        hints=(
            "Eq. 9 only adds up probabilities. What is missing to a share that adds up "
            "exp2(s - its own maximum), and is it the same number for all keys of the share?",
            "p_i = exp2(s_i - lse) = exp2(s_i - m_p) exp2(m_p - lse), with lse = M + log2(sum_p "
            "exp2(m_p - M) sums_p). So score_j = sum over heads and shares of exp2(m_p - lse) "
            "times the share's sum of exp2(s_i - m_p) overlap_ij.",
            "a loop: read; maximum, 0 where it is -inf; weights; 0 for the values of hidden keys; "
            "weights times values, their sum, weights times overlap. After it: stack; combine of "
            "09.3; the total and the factors; multiply, add over shares and heads",
        ),
        seconds=20.0,  # one of its cases is large
    ),
]
