"""Set 10, the compression kernel: a short tile, a group, Eq. 9 as sums, a running top n, a walk."""

import torch
from torch import Tensor

from exercises.compare import close, matches, name_mistake
from exercises.memory import largest_made
from exercises.records import Case, Exercise, in_turn
from nsa_lite.blocks import overlap_in_strides

from . import mistakes

# --- 10.1 ---

LOADS = {
    "a whole tile": dict(first=4, rows=4, count=9, width=3),
    "a number stands behind": dict(first=3, rows=7, count=6, width=6, filled=7.0),
    "a ragged last tile": dict(first=5, rows=5, count=7, width=2),
    "the first tile, and it is short": dict(first=0, rows=6, count=5, width=4),
    "the end of the memory too": dict(first=6, rows=3, count=8, width=5, behind=0),
    "nothing exists": dict(first=10, rows=7, count=8, width=2, behind=5),
    "one row": dict(first=12, rows=1, count=13, width=1),
}


def load_case(generator, name, first, rows, count, width, behind=9, filled=torch.nan) -> Case:
    """`behind` rows of anything follow those that exist."""
    memory = torch.randn(count + behind, width, generator=generator)
    memory[count:] = filled
    tile = torch.zeros(rows, width)
    real = memory[first : min(first + rows, count)]
    tile[: len(real)] = real
    arguments = dict(memory=memory, first=first, rows=rows, count=count)
    return Case(name, arguments, tile, ("row", "channel"), explain_load)


def explain_load(got, expected, memory, first, rows, count):
    """A known mistake, or NaN."""
    if said := name_mistake(got, mistakes.LOADS, (memory, first, rows, count)):
        return said
    if got.isnan().any():
        return (
            f"row {int(got.isnan().any(1).nonzero()[0])} is NaN: it does not exist, and 0 times "
            "NaN is NaN"
        )
    return None


# --- 10.2 ---


def level(*levels):
    """Move the scores of query t to the level t, of all heads alike."""

    def move(q, k):
        q = q.clone()
        k = k.clone()
        root = q.shape[2] ** 0.5
        q[:, :, 0] = torch.tensor(levels).repeat(q.shape[1])[: q.shape[1]] * root / 16
        k[:, 0] = 16.0
        return q, k

    return move


GROUPS = {
    "all keys visible": dict(length=3, keys=4, at=(40, 0), heads=2, l=6, d=2),
    "on the staircase": dict(length=9, keys=4, at=(9, 3), heads=3, l=6, d=2, width=3),
    "above the staircase": dict(length=7, keys=5, at=(12, 3), heads=3, l=6, d=2, width=3),
    "the first tile": dict(length=10, keys=3, at=(0, 0), heads=2, l=5, d=5, width=5),
    "blocks of two strides": dict(length=6, keys=7, at=(20, 4), heads=4, l=4, d=2, width=2),
    "blocks of three strides": dict(length=9, keys=6, at=(21, 2), heads=2, l=9, d=3, width=6),
    "one head": dict(length=5, keys=4, at=(13, 1), heads=1, l=4, d=2),
    "equal scores": dict(length=4, keys=5, at=(17, 2), heads=3, l=6, d=3, spread=0.0, width=3),
    "large scores": dict(
        length=5, keys=6, at=(16, 3), heads=2, l=4, d=2, move=level(150.0, 140.0), width=3
    ),
    "very negative scores": dict(
        length=6, keys=4, at=(14, 3), heads=3, l=4, d=2, move=level(-160.0), width=5
    ),
    "queries that see nothing": dict(length=8, keys=2, at=(0, 0), heads=2, l=7, d=1, width=3),
}


def group_case(  # noqa: PLR0913  a case's sizes
    generator, name, length, keys, at, heads, l, d, width=4, spread=1.0, move=None
) -> Case:
    """A tile of all scores; lse is that of all keys, and keys that no query sees are NaN."""
    first_token, first_key = at
    q = torch.randn(heads, length, width, generator=generator) * spread
    k = torch.randn(first_key + keys + 3, width, generator=generator) * spread
    if move is not None:
        q, k = move(q, k)
    t = first_token + torch.arange(length)
    seen = torch.arange(len(k)) * d + l - 1 <= t[:, None]
    s = (q.double() @ k.double().T / width**0.5).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(2)
    p = (s - lse.nan_to_num(neginf=0.0)[:, :, None]).exp().sum(0)
    k[~seen.any(0)] = torch.nan
    tile = slice(first_key, first_key + keys)
    arguments = dict(q=q, k=k[tile].clone(), lse=lse.float(), first_token=first_token)
    arguments |= dict(first_key=first_key, block_size=l, stride=d)
    return Case(name, arguments, p[:, tile].float(), ("query", "key"), explain_group)


def explain_group(got, expected, **arguments):
    """A row that must be 0, or a known mistake."""
    blind = (arguments["lse"] == -torch.inf).all(0)
    for t in blind.nonzero().flatten().tolist():
        if got[t].isnan().any():
            return f"query {t} sees no key, and it is NaN: its lse is -inf"
        if got[t].any():
            return f"query {t} sees no key, and its probabilities are not 0"
    if got.isnan().any():
        t, i = got.isnan().nonzero()[0].tolist()
        return f"query {t}, key {i} is NaN: a key that may not be read holds no number"
    if not got.isfinite().all():
        return "exp of a large score is not finite: take the log-sum-exp off first"
    return name_mistake(got, mistakes.GROUPS, tuple(arguments.values()))


# --- 10.3 ---

SUMS = {
    "two keys a block": dict(length=3, keys=8, l=4, d=2, select=4),
    "four keys a block": dict(length=2, keys=8, l=6, d=3, select=12),
    "a last block with fewer keys": dict(length=4, keys=10, l=4, d=2, select=8),
    "blocks of three strides": dict(length=5, keys=9, l=9, d=3, select=12),
    "blocks of four strides": dict(length=2, keys=7, l=12, d=3, select=15),
    "blocks side by side": dict(length=6, keys=5, l=5, d=5, select=15),
    "one key a block": dict(length=3, keys=6, l=5, d=5, select=5),
    "fewer keys than a block": dict(length=7, keys=2, l=6, d=2, select=10),
    "a selection block as long as a key": dict(length=3, keys=11, l=8, d=2, select=8),
}


def sums_case(generator, name, length, keys, l, d, select) -> Case:
    """Overlaps by geometry, of each key with the block where it begins and with the next."""
    total = torch.rand(length, keys, generator=generator)
    blocks = -(-keys * d // select)
    overlap = overlap_in_strides(keys, blocks + 1, l, d, select).double()
    begins = torch.arange(keys) * d // select
    is_own = begins[:, None] == torch.arange(blocks + 1)
    own = total.double() @ (overlap * is_own)
    passed = total.double() @ (overlap * ~is_own)
    expected = (own[:, :blocks].float(), passed[:, 1:].float())
    arguments = dict(total=total, block_size=l, stride=d, select_block_size=select)
    axes = {"own": ("query", "block"), "passed_on": ("query", "block")}
    return Case(name, arguments, expected, axes, explain_sums)


def explain_sums(got, expected, **arguments):
    """A known mistake in the own sums, or else in what is passed on."""
    given = tuple(arguments.values())
    if matches(got[::-1], expected):
        return "own and passed_on are exchanged"
    if not matches(got[0], expected[0]):
        said = name_mistake(got, mistakes.OWN, given, part=lambda result: result[0])
        return said and f"own: {said}"
    said = name_mistake(got, mistakes.PASSED, given, part=lambda result: result[1])
    return said and f"passed_on: {said}"


# --- 10.4 ---

NO = -torch.inf
CHUNKS = {
    "one chunk": dict(n=2, chunk=5, blocks=5, rows=4),
    "three chunks": dict(n=3, chunk=2, blocks=6, rows=4),
    "a short last chunk": dict(n=2, chunk=4, blocks=11, rows=3),
    "chunks of one block": dict(n=4, chunk=1, blocks=7, rows=2),
    "as many chosen as there are": dict(n=9, chunk=4, blocks=9, rows=3),
    "fewer blocks than are chosen": dict(n=6, chunk=3, blocks=4, rows=5),
    "blocks that have not begun": dict(
        n=3, chunk=2, rows=3, given=[[4, NO, NO, NO, NO], [2, 3, NO, NO, NO], [NO] * 5]
    ),
    "equal scores": dict(n=3, chunk=3, blocks=9, rows=2, given=[[0.0] * 9, [1.0] * 9]),
    "equal scores in other chunks": dict(
        n=3, chunk=2, rows=2, given=[[5, 1, 3, 3, 0, 3, 5], [2, 2, 4, 2, 2, 2, 2]]
    ),
    "the last chunk comes first": dict(
        n=2, chunk=3, rows=3, given=[[1, 1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 2, 0], [3] * 7], turn=-1
    ),
    "scores below 0": dict(n=3, chunk=3, rows=2, given=[[-5, -2, -9, -1, -7, NO], [-3] * 5 + [NO]]),
    "scores far apart": dict(
        n=2, chunk=2, rows=2, given=[[1e30, -1e30, 3e30, 0, 2e30], [-1e30, -3e30, -2e30, NO, NO]]
    ),
    "forced blocks": dict(
        n=4, chunk=3, rows=1, given=[[torch.inf, 0.5, 0.25, 0.75, 2.0, torch.inf, torch.inf, NO]]
    ),
    "better and better": dict(
        n=2, chunk=2, rows=1, given=[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    ),
    "worse and worse": dict(
        n=3, chunk=4, rows=1, given=[[12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
    ),
}


def chunk_case(generator, name, n, chunk, rows, blocks=0, given=None, turn=1) -> Case:
    """The whole walk, chunk after chunk; turn=-1 begins with the last one."""
    if given is None:
        scores = torch.rand(rows, blocks, generator=generator) + 0.1
    else:
        scores = torch.tensor(given, dtype=torch.float32)
    expected = [best_of_row(row, n) for row in scores.tolist()]
    result = (torch.tensor([x for _, x in expected]), torch.tensor([ids for ids, _ in expected]))
    arguments = dict(scores=scores, n=n, chunk=chunk, turn=turn)
    axes = {"best": ("query", "place"), "ids": ("query", "place")}
    return Case(name, arguments, result, axes, explain_chunks, fold_all)


def best_of_row(row: list[float], n: int) -> tuple[list[int], list[float]]:
    """The best n ids in ascending order, then -1, and their scores: by a sort of all."""
    legal = [j for j, score in enumerate(row) if score > NO]
    ids = sorted(sorted(legal, key=lambda j: (-row[j], j))[:n])
    lacking = n - len(ids)
    return ids + [-1] * lacking, [row[j] for j in ids] + [NO] * lacking


def fold_all(answer, scores, n, chunk, turn):
    """Chunk after chunk from nothing; at the end the ids in order, with their scores."""
    best = torch.full((len(scores), n), NO)
    ids = torch.full((len(scores), n), -1)
    firsts = range(0, scores.shape[1], chunk)[::turn]
    for first in firsts:
        result = answer(best, ids, scores[:, first : first + chunk].clone(), first)
        if not is_state(result, best):
            return result  # the message will say what is wrong with its form
        best, ids = result
    last = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids.long())
    place = last.argsort(1)
    return best.gather(1, place), ids.long().gather(1, place)


def is_state(result, best: Tensor) -> bool:
    """Whether it has the form of best and ids."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        return False
    if not all(isinstance(x, Tensor) and x.shape == best.shape for x in result):
        return False
    return result[0].is_floating_point() and not result[1].is_floating_point()


def explain_chunks(got, expected, scores, n, chunk, turn):
    """A known mistake; in a case of one query, also the block that is wrong."""
    if matches(got[1], expected[1]):
        return "ids are right, and the scores in best are not theirs"
    arguments = (scores, n, chunk, turn)
    said = name_mistake(got, mistakes.KEPT, arguments, call=fold_all, part=lambda result: result[1])
    is_last = len(scores) == 1  # those before may still tell two mistakes apart
    return said or (
        wrong_row(got[1].tolist(), expected[1].tolist(), scores.tolist()) if is_last else None
    )


def wrong_row(got, expected, scores) -> str | None:
    """What is wrong with the first wrong list of ids."""
    for t, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if mine == right:
            continue
        ids = [j for j in mine if j >= 0]
        if any(ids.count(j) > 1 for j in ids):
            return f"query {t} keeps block {next(j for j in ids if ids.count(j) > 1)} twice"
        illegal = [j for j in ids if j >= len(scores[t]) or scores[t][j] == NO]
        if illegal:
            return f"query {t} keeps block {illegal[0]}, which it may not read"
        missed = next((j for j in right if j not in mine), None)
        if missed is not None:
            return f"query {t} lacks block {missed}, one of the best {len(right)}"
    return None


# --- 10.5 ---

CHOICES = {
    "two blocks a tile": dict(
        length=40, heads=2, tile=2, sizes=dict(block_size=4, stride=2, select_block_size=8)
    ),
    "one block a tile": dict(
        length=37,
        heads=3,
        tile=1,
        sizes=dict(block_size=6, stride=3, select_block_size=6),
        n=5,
        forced=(1, 1),
    ),
    "blocks of three strides": dict(
        length=55,
        heads=2,
        tile=3,
        sizes=dict(block_size=6, stride=2, select_block_size=10),
        width=3,
    ),
    "blocks side by side": dict(
        length=50,
        heads=1,
        tile=5,
        sizes=dict(block_size=5, stride=5, select_block_size=5),
        n=6,
        forced=(2, 3),
    ),
    "forced alone": dict(
        length=46,
        heads=4,
        tile=3,
        sizes=dict(block_size=4, stride=2, select_block_size=12),
        n=4,
        forced=(3, 1),
        width=5,
    ),
    "more is chosen than there is": dict(
        length=30,
        heads=2,
        tile=2,
        sizes=dict(block_size=4, stride=4, select_block_size=8),
        n=7,
        spread=0.0,
        width=6,
    ),
    "large scores": dict(
        length=44,
        heads=2,
        tile=4,
        sizes=dict(block_size=6, stride=2, select_block_size=6),
        move=level(150.0, 140.0),
        width=3,
    ),
    "very negative scores": dict(
        length=33,
        heads=3,
        tile=2,
        sizes=dict(block_size=6, stride=3, select_block_size=9),
        move=level(-160.0),
    ),
    "fewer tokens than a block": dict(
        length=4, heads=2, tile=2, sizes=dict(block_size=7, stride=7, select_block_size=7), n=3
    ),
}


def choice_cases(generator: torch.Generator) -> list[Case]:
    """The choices, and last the memory of a longer sequence."""
    long = dict(
        length=190,
        heads=2,
        tile=2,
        sizes=dict(block_size=4, stride=2, select_block_size=4),
        n=5,
        width=3,
    )
    case = choice_case(generator, "tile by tile", **long)
    axes = {"ids": ("query", "place"), "largest tensor": ()}
    last = Case(
        case.name,
        case.arguments,
        (case.expected, allowed_numbers(**case.arguments)),
        axes,
        explain_choice,
        with_largest,
    )
    return [*in_turn(choice_case, CHOICES)(generator), last]


def choice_case(  # noqa: PLR0913  a case's sizes
    generator, name, length, heads, tile, sizes, n=4, forced=(1, 2), width=4, spread=1.0, move=None
) -> Case:
    """One group's queries and keys; the choice by looking at one query after the other."""
    l, d, select = sizes.values()
    count = max(0, (length - l) // d + 1)
    q = 2 * torch.randn(heads, length, width, generator=generator) * spread
    k = torch.randn(count, width, generator=generator) * spread
    if move is not None:
        q, k = move(q, k)
    seen = torch.arange(count) * d + l - 1 <= torch.arange(length)[:, None]
    s = (q.double() @ k.double().T / width**0.5).masked_fill(~seen, NO)
    lse = s.logsumexp(2) if count else torch.full((heads, length), NO)
    p = (s - lse.nan_to_num(neginf=0.0)[:, :, None]).exp().sum(0)
    blocks = -(-length // select)
    score = p @ overlap_in_strides(count, blocks, l, d, select).double()
    rule = dict(**sizes, num_selected=n, num_initial=forced[0], num_local=forced[1])
    ids = [choose_row(row, t, rule) for t, row in enumerate(score.float().tolist())]
    arguments = dict(q=q, k=k, lse=lse.float(), sizes=rule, tile=tile)
    return Case(name, arguments, torch.tensor(ids), ("query", "place"), explain_choice)


def choose_row(score: list[float], t: int, rule: dict[str, int]) -> list[int]:
    """The forced blocks, then the best of those that have begun, the lower id among equals."""
    own = t // rule["select_block_size"]
    forced = forced_blocks(own, rule)
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-score[j], j))
    ids = sorted([*forced, *rest][: rule["num_selected"]])
    return ids + [-1] * (rule["num_selected"] - len(ids))


def forced_blocks(own: int, rule: dict[str, int]) -> list[int]:
    """The first blocks and the last ones up to the own one."""
    return [j for j in range(own + 1) if j < rule["num_initial"] or j > own - rule["num_local"]]


def with_largest(answer, q, k, lse, sizes, tile):
    """The ids, and the numbers in the largest tensor on the way; an allowed size counts as none."""
    result, largest = largest_made(lambda: answer(q, k, lse, sizes, tile))
    return result, max(largest, allowed_numbers(q, k, lse, sizes, tile))


def allowed_numbers(q, k, lse, sizes, tile) -> int:
    """A tile's scores of all heads, with room; or the overlaps of all keys and blocks."""
    heads, length, width = q.shape
    keys = tile * sizes["select_block_size"] // sizes["stride"]
    blocks = -(-length // sizes["select_block_size"])
    return max(heads * length * max(keys + 4, width), len(k) * blocks)


def explain_choice(got, expected, q, k, lse, sizes, tile):
    """The way to right ids, or the first query whose ids are wrong."""
    if isinstance(expected, tuple):
        if matches(got[0], expected[0]):
            return (
                f"the ids are right, but a tensor of {got[1]} numbers was made, for {q.shape[1]} "
                f"queries and tiles of {tile} blocks: keep the best of each query, not all scores"
            )
        got = got[0]
        expected = expected[0]
    t = int((~close(got, expected).all(1)).nonzero()[0])
    return f"query {t} {wrong_ids(got[t].tolist(), expected[t].tolist(), t, sizes)}"


def wrong_ids(mine: list[int], right: list[int], t: int, sizes: dict[str, int]) -> str:
    """What is wrong with one query's ids."""
    size = sizes["select_block_size"]
    own = t // size
    ids = [j for j in mine if j >= 0]
    future = [j for j in ids if j > own]
    if future:
        return f"chose block {future[0]}, which begins at token {future[0] * size}"
    if len(set(ids)) < len(ids):
        return f"chose a block twice: {mine}"
    forced = forced_blocks(own, sizes)
    lacking = [j for j in forced if j not in ids]
    if lacking:
        return f"lacks block {lacking[0]}, one of the forced blocks {forced}"
    if sorted(ids) == [j for j in right if j >= 0]:
        return f"chose the right blocks, and {mine} is not ascending with -1 at the end"
    missed = [j for j in right if j not in ids]
    if not missed:
        return f"chose {len(ids)} blocks, and {len(right)} are asked for"
    wrong = [j for j in ids if j not in right]
    instead = f", and chose block {wrong[0]}" if wrong else ""
    return f"lacks block {missed[0]}, one of the best{instead}"


EXERCISES = [
    Exercise(
        "10.1",
        "A tile that reaches beyond the end",
        "warm-up",
        5,
        in_turn(load_case, LOADS),
        hints=(
            "Which rows of memory does the tile want? Which of them exist, and which addresses may "
            "be touched at all?",
            "row i of the tile is row first + i of memory if first + i < count, else 0.",
            "the addresses first + 0, 1, ...; which are below count; read at addresses held within "
            "the memory; torch.where with 0",
        ),
    ),
    Exercise(
        "10.2",
        "The probabilities of a group",
        "core",
        15,
        in_turn(group_case, GROUPS),
        hints=(
            "The log-sum-exp is known. What is left to do to a score, and must a tile know of "
            "other tiles?",
            "p = exp(s - lse) where (first_key + i) d + l - 1 <= first_token + t, else 0; then the "
            "sum over the heads. Where lse is -inf, -inf - -inf is NaN.",
            "scores of all heads, scaled; the mask (T, N) from both positions; torch.where of "
            "exp(s - lse) and 0; sum over axis 0",
        ),
    ),
    Exercise(
        "10.3",
        "Eq. 9 as two sums",
        "core",
        20,
        in_turn(sums_case, SUMS),
        hints=(
            "How many keys begin in one selection block? How far does the last of them reach into "
            "the next?",
            "Key k of its block (k = 0, 1, ...) begins k d tokens in. It has max(0, k d + l - l') "
            "/ d strides in the next block and the rest of its l / d in its own.",
            "keys a block = l' / d; pad total with zeros to whole blocks; cut the axis in two "
            "(blocks, keys); weights of the keys, for own and for the next; two weighted sums",
        ),
    ),
    Exercise(
        "10.4",
        "The best n so far",
        "core",
        20,
        in_turn(chunk_case, CHUNKS),
        hints=(
            "A block was among the best n of all. Can it have been outside of the best n of those "
            "seen when its chunk came?",
            "new state = the n best of the n kept and the chunk. By score, descending; equal "
            "scores by id, ascending: sort by id first, then stably by score.",
            "ids of the chunk; join ids and scores with the state; sort both by id; stable sort by "
            "score, descending; the first n; -1 where the score is -inf",
        ),
    ),
    Exercise(
        "10.5",
        "Choose without the row of scores",
        "stretch",
        45,
        choice_cases,
        hints=(
            "What of a tile does the next tile need? What of the scores does the end need?",
            "Tile by tile: p (10.2) of the keys that begin in its blocks; own and passed on "
            "(10.3); score = own + what the block before passed on, across the tile's border too; "
            "+inf for forced blocks, -inf for those that have not begun; keep the best (10.4).",
            "state: best, ids, and carry (T,), what the last block passed on; a loop over tiles of "
            "blocks; keys from j l'/d on; pad to the tile's number of blocks; add; mask; keep; at "
            "the end sort the ids with -1 last",
        ),
    ),
]
