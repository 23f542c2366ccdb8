"""Set 08, the open project: what a choice covers, what a budget buys, and a rule of your own."""

import torch
from torch import Tensor

from exercises import contest
from exercises.compare import name_mistake, same
from exercises.records import Case, Exercise, in_turn

from . import mistakes

# --- 08.1 ---

COVERED = {
    "one block": dict(ids=[[2], [0]], blocks=4),
    "several blocks": dict(ids=[[0, 2, 3], [1, 2, 4], [0, 1, 3]], blocks=5),
    "padding": dict(ids=[[0, -1, -1], [1, 2, -1], [0, 1, 3]], blocks=4),
    "nothing chosen": dict(ids=[[-1, -1], [0, 2]], blocks=3),
    "everything chosen": dict(ids=[[0, 1, 2], [0, 1, -1], [-1, -1, -1], [0, 1, 2]], blocks=3),
    "many blocks": dict(ids=[[3, 6], [0, -1], [5, 6], [-1, -1], [1, 2]], blocks=7),
    "one query": dict(ids=[[0, 2, 4, 5, -1, -1]], blocks=6),
}


def covered_case(generator, name, ids, blocks) -> Case:
    """Random shares of the blocks, added up one by one."""
    mass = torch.rand(len(ids), blocks, generator=generator) + 0.1
    mass = mass / mass.sum(1, keepdim=True)
    shares = [
        sum(row[j] for j in chosen if j >= 0)
        for row, chosen in zip(mass.tolist(), ids, strict=True)
    ]
    arguments = dict(mass=mass, ids=torch.tensor(ids, dtype=torch.int32))
    return Case(name, arguments, torch.tensor(shares), ("query",), explain_covered)


def explain_covered(got, expected, mass, ids):
    """A known mistake."""
    return name_mistake(got, mistakes.COVERED, (mass, ids))


# --- 08.2 ---

CHOICES = {
    "nothing kept": dict(own=9, kept=0, budget=40),
    "one vector a block": dict(own=9, kept=1, budget=50),
    "a budget that leaves a rest": dict(own=9, kept=2, budget=63),
    "equal scores": dict(own=7, kept=0, budget=40, score=[0.0, 1, 1, 1, 1, 1, 0]),
    "a forced block with the best score": dict(
        own=6, kept=0, budget=32, score=[0.9, 0.1, 0.7, 0.8, 0.2, 0.95]
    ),
    "the first block is also the local one": dict(own=1, kept=1, budget=100, score=[0.5]),
    "no block is finished": dict(own=0, kept=2, budget=40, score=[]),
    "room for more than there is": dict(own=5, kept=1, budget=500),
    "blocks of 5": dict(own=11, kept=1, budget=46, block_size=5),
    "paid to the last vector": dict(own=13, kept=3, budget=3 * 13 + 6 * 12, block_size=12),
    "one vector short": dict(own=10, kept=2, budget=2 * 10 + 5 * 9 - 1, block_size=9),
    "two rests that make a block": dict(own=9, kept=3, budget=63, block_size=7),
    "just the forced blocks": dict(own=8, kept=1, budget=8 + 3 * 6, block_size=6),
    "scores below 0": dict(
        own=8, kept=1, budget=43, block_size=7, score=[-9, -3, -5, -1e-3, -7, -2, -8, -9]
    ),
    "very large and very negative scores": dict(
        own=8, kept=0, budget=25, block_size=5, score=[0, 1e30, -1e30, 3e30, 2e30, -3e30, 5, -1e38]
    ),
    "scores that differ by little": dict(
        own=7, kept=1, budget=51, block_size=11, score=[0, 500.02, 500.04, 500.01, 500.03, 500, 0]
    ),
}


def choose_case(generator, name, own, kept, budget, score=None, block_size=8) -> Case:
    """Random scores in which nobody would choose the forced blocks, or given ones."""
    if score is None:
        score = torch.rand(own, generator=generator)
        score[[0, own - 1]] = -1.0
    score = torch.as_tensor(score, dtype=torch.float32)
    arguments = dict(score=score, own=own, kept=kept, budget=budget, block_size=block_size)
    return Case(name, arguments, best_by_hand(**arguments), explain=explain_choice)


def best_by_hand(score: Tensor, own: int, kept: int, budget: int, block_size: int) -> list[int]:
    """One block at a time: the best that is left, while one more can be paid."""
    ids = {0, max(own - 1, 0), own}
    left = budget - kept * own - block_size * len(ids)
    while left >= block_size and len(ids) <= own:
        rest = [j for j in range(own) if j not in ids]
        ids.add(max(rest, key=lambda j: (float(score[j]), -j)))
        left -= block_size
    return sorted(ids)


def explain_choice(got, expected, score, own, kept, budget, block_size):
    """A block that may not be chosen, or must be; else what the choice costs."""
    ids = list(got)
    forced = sorted({0, max(own - 1, 0), own})
    if wrong := [j for j in ids if not 0 <= j <= own]:
        return f"block {wrong[0]} was chosen, and the query is in block {own}"
    if twice := [j for j in ids if ids.count(j) > 1]:
        return f"block {twice[0]} was chosen twice"
    if lacking := [j for j in forced if j not in ids]:
        return f"block {lacking[0]} is missing, one of the forced blocks {forced}"
    return explain_cost(ids, expected, score, own, kept, budget, block_size)


def explain_cost(got, expected, score, own, kept, budget, block_size):
    """Too many or too few blocks, another order, or another choice."""
    cost = kept * own + block_size * len(got)
    paid = f"{kept} x {own} vectors kept and {len(got)} blocks of {block_size}"
    if len(got) > len(expected):
        return f"{paid} are {cost} vectors, and the budget is {budget}"
    if len(got) < len(expected):
        return f"{paid} are {cost} of {budget} vectors: one more block can be paid"
    if got != sorted(got):
        return f"the ids {got} do not ascend"
    taken = next(j for j in got if j not in expected)
    missed = next(j for j in expected if j not in got)
    if score[taken] == score[missed]:
        return f"blocks {missed} and {taken} have equal scores: the lower id comes first"
    return f"block {taken} was chosen, and block {missed} has a higher score"


# --- 08.3 ---


def rule_cases(generator: torch.Generator) -> list[Case]:
    """Each case looks at a rule in its own way; all use two worlds."""
    w = contest.world(generator)
    other = contest.world(generator)
    looks = {
        "what is kept": (look_at_kept, dict(blocks=w.blocks)),
        "one score for each finished block": (look_at_score, dict(q=w.q[0], blocks=w.blocks)),
        "from q and kept alone": (
            look_at_memory,
            dict(q=w.q[0], blocks=w.blocks, others=other.blocks),
        ),
        "better than block means": (look_at_share, dict(worlds=[w, other])),
    }
    return [
        Case(name, arguments, "valid", explain=lambda got, *_, **__: got, call=look)
        for name, (look, arguments) in looks.items()
    ]


def look_at_kept(rule, blocks):
    """What is kept of each block: rows of 16, equally many, and affordable."""
    before = blocks.clone()
    kept = [rule().keep(block) for block in blocks]
    if not torch.equal(blocks, before):
        return "keep changed its block in place; work on a copy"
    again = [rule().keep(block) for block in blocks]
    if not all(map(same, kept, again)):
        return "two calls of keep with the same block gave different vectors"
    for j, vectors in enumerate(kept):
        if not isinstance(vectors, Tensor):
            return f"keep returned a {type(vectors).__name__}, and a tensor was asked for"
        if vectors.dim() != 2 or vectors.shape[1] != blocks.shape[2]:
            return f"keep returned the shape {tuple(vectors.shape)}, and (m, 16) was asked for"
        if len(vectors) != len(kept[0]):
            return (
                "the same number of vectors must be kept of each block: of block 0 "
                f"{len(kept[0])}, of block {j} {len(vectors)}"
            )
        if not vectors.isfinite().all():
            return f"what is kept of block {j} is not finite"
    return too_much(len(kept[0]), len(blocks) - 1)


def too_much(m: int, finished: int) -> str:
    """Whether what is kept and the forced blocks fit into the smallest budget."""
    cost = m * finished + contest.FORCED * contest.BLOCK
    budget = min(contest.BUDGETS)
    if cost <= budget:
        return "valid"
    return (
        f"{m} vectors of {finished} blocks and {contest.FORCED} forced blocks are {cost} "
        f"vectors, and the smallest budget is {budget}"
    )


def look_at_score(rule, q, blocks):
    """One number for each finished block, from 1 block to 31."""
    kept = torch.stack([rule().keep(block) for block in blocks])
    for own in (1, 2, 17, 31):
        given = kept[:own].clone()
        query = q.clone()
        score = rule().score(query, given)
        if not torch.equal(given, kept[:own]) or not torch.equal(query, q):
            return "score changed its inputs in place; work on a copy"
        if not isinstance(score, Tensor):
            return f"score returned a {type(score).__name__}, and a tensor was asked for"
        if score.shape != (own,):
            return (
                f"score returned the shape {tuple(score.shape)} for {own} finished blocks, "
                f"and ({own},) was asked for"
            )
        if score.isnan().any():
            return f"the score of block {int(score.isnan().nonzero()[0])} is NaN"
    return "valid"


def look_at_memory(rule, q, blocks, others):
    """The same scores again, also after other blocks were kept."""
    kept = torch.stack([rule().keep(block) for block in blocks])
    first, again = (rule().score(q, kept[:20]) for _ in range(2))
    if not torch.equal(first, again):
        return "two calls of score with the same q and kept gave different scores"
    for block in others:
        rule().keep(block)
    if not torch.equal(rule().score(q, kept[:20]), first):
        return "the scores changed once other blocks were kept: use q and kept, nothing stored"
    return look_at_new_vectors(rule, q, kept[:20], first)


def look_at_new_vectors(rule, q, kept, scores):
    """Nearly the same scores from vectors that lie near those kept, and were never kept."""
    near = kept * (1 + 1e-6)
    try:
        again = rule().score(q, near)
    except Exception as error:
        return (
            "score stopped at vectors that keep never returned "
            f"({type(error).__name__}): use q and kept, nothing stored"
        )
    if not torch.allclose(again.double(), scores.double(), rtol=1e-2, atol=1e-2):
        return "vectors near those kept got other scores: use q and kept, nothing stored"
    return "valid"


def look_at_share(rule, worlds):
    """More of the attention covered than by block means."""
    mine = contest.mean_share(contest.play(rule, worlds))
    given = contest.mean_share(contest.play(contest.BlockMeans, worlds))
    if mine > given:
        return "valid"
    return (
        f"your rule covers {mine:.3f} of the attention, mean of the budgets "
        f"{', '.join(map(str, contest.BUDGETS))}; block means cover {given:.3f}"
    )


# --- 08.4 ---

NO_GRADIENT = 12345.0  # in the place of a gradient that does not exist
TAUGHT = {
    "all blocks are candidates": dict(rows=2, blocks=5),
    "forced blocks are none": dict(rows=4, blocks=6, shut=[(0, 0), (1, 0), (1, 5), (2, 3), (3, 0)]),
    "equal scores": dict(rows=3, blocks=4, scale=0.0, shut=[(0, 1), (2, 3)]),
    "one candidate": dict(rows=1, blocks=3, shut=[(0, 0), (0, 2)]),
    "the teacher leaves blocks out": dict(rows=3, blocks=5, without=[(0, 2), (1, 0), (1, 4)]),
    "the teacher agrees": dict(rows=2, blocks=7, agree=True, shut=[(0, 0), (1, 6)]),
    "scores far apart": dict(rows=3, blocks=6, scale=200.0, shut=[(1, 2)]),
    "large scores": dict(rows=2, blocks=5, shift=500.0, shut=[(0, 4)]),
    "very negative scores": dict(rows=5, blocks=3, shift=-500.0, shut=[(4, 1)]),
    "anything where no candidate stands": dict(
        rows=3, blocks=7, shut=[(0, 0), (0, 6), (1, 1), (2, 5)], filled=-torch.inf
    ),
    "a query without candidates": dict(rows=2, blocks=4, shut=[(1, j) for j in range(4)]),
}


def taught_case(  # noqa: PLR0913  a case's sizes
    generator, name, rows, blocks, shut=(), without=(), scale=1.0, shift=0.0, agree=False, filled=0
) -> Case:
    """Random scores and masses; `shut` are no candidates, `without` have no mass."""
    z = torch.randn(rows, blocks, generator=generator) * scale + shift
    mass = 3 * torch.rand(rows, blocks, generator=generator) + 0.1
    among = torch.ones(rows, blocks, dtype=torch.bool)
    for place in shut:
        among[place] = False
    for place in without:
        mass[place] = 0.0
    if agree:
        mass = 2 * z.exp()
    expected = kl_by_rows(z.double(), mass.double(), among)
    z[~among] += filled
    arguments = dict(z=z, mass=mass, among=among)
    axes = {"loss": ("query",), "gradient of z": ("query", "block")}
    return Case(name, arguments, expected, axes, explain_teacher, with_gradient)


def kl_by_rows(z: Tensor, mass: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row by its definition, and its gradient s - p."""
    losses = []
    gradient = torch.zeros_like(z)
    for t, legal in enumerate(among):
        loss = torch.zeros((), dtype=z.dtype)
        if legal.any():
            p = mass[t, legal] / mass[t, legal].sum()
            log_s = z[t, legal].log_softmax(0)
            loss = sum(x * (x.log() - y) for x, y in zip(p, log_s, strict=True) if x > 0)
            gradient[t, legal] = log_s.exp() - p
        losses.append(loss)
    return torch.stack(losses).float(), gradient.float()


def with_gradient(answer, z, mass, among):
    """The losses, and the gradient of their sum by z."""
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        loss = answer(leaf, mass, among)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return loss, torch.full_like(z, NO_GRADIENT)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def explain_teacher(got, expected, z, mass, among):
    """No gradient, a row that is no number, or a known mistake in the loss or in the gradient."""
    if (got[1] == NO_GRADIENT).all():
        return "the loss has no gradient by z: is it detached, or made of numbers?"
    for part, what in zip(got, ("loss", "gradient"), strict=True):
        lost = ~part.isfinite()
        if lost.any():
            t = int(lost.nonzero()[0][0])
            return f"query {t}: the {what} is not finite: {why_lost(mass[t], among[t])}"
    arguments = (z, mass, among)
    return name_mistake(
        got, mistakes.TEACHERS, arguments, call=with_gradient, part=lambda result: result[0]
    )


def why_lost(mass: Tensor, among: Tensor) -> str:
    """What may have made a row's loss infinite or NaN."""
    if not among.any():
        return "it has no candidate, and its loss is 0"
    if (mass[among] == 0).any():
        return "a block without mass adds 0, and 0 log 0 is NaN"
    return "log of a share that has become 0, or of what is no candidate; take the log-softmax"


EXERCISES = [
    Exercise(
        "08.1",
        "What a choice covers",
        "warm-up",
        5,
        in_turn(covered_case, COVERED),
        hints=(
            "What does mass[t, -1] give in Python, and what should an id of -1 give?",
            "covered_t = sum of mass[t, j] over the ids j >= 0 of query t.",
            "look up the mass at the ids, with -1 moved to any legal id; set these places to 0; "
            "sum over the ids",
        ),
    ),
    Exercise(
        "08.2",
        "Fill the budget",
        "core",
        20,
        in_turn(choose_case, CHOICES),
        hints=(
            "What has been spent before the first block is chosen? How many blocks does the rest "
            "pay for, the forced ones included?",
            "number of blocks = floor((budget - kept own) / l'), at least the forced ones, at most "
            "own + 1.",
            "a set of the forced ids; sort the finished blocks by score, equal ones by id; add one "
            "after the other while there is room; return the set sorted",
        ),
    ),
    Exercise(
        "08.3",
        "A rule of your own",
        "stretch",
        60,
        rule_cases,
        hints=(
            "The mean hides one large key among 32. The largest key hides the other 31. What would "
            "tell you about both?",
            "The true mass of a block is proportional to sum_i exp(q.k_i / sqrt(D)). With n keys "
            "near one vector c, n exp(q.c / sqrt(D)) is a good guess for their part of it.",
            "keep: the key that is farthest from the mean, and the mean of the others. score: for "
            "each head, log of (31 exp of one scaled product + exp of the other); softmax over the "
            "blocks; sum over the heads",
        ),
        seconds=20,
    ),
    Exercise(
        "08.4",
        "A teacher for the choice",
        "core",
        20,
        in_turn(taught_case, TAUGHT),
        hints=(
            "Whose shares must sum to 1 over the candidates? What does a block without mass add?",
            "p_j = mass_j / sum of mass, s = softmax(z), both over the candidates; loss = sum_j "
            "p_j (log p_j - log s_j), where p_j = 0 adds 0. log s_j = z_j - logsumexp(z).",
            "0 for the mass of others; divide by the sum (1 if it is 0); z with a very negative "
            "finite number for others; log_softmax; torch.xlogy(p, p) - p log_s; sum over the "
            "candidates",
        ),
    ),
]
