"""An experiment: the compressed branch's forward with softmax and products at the same time.

    python -m benchmarks.gluon_forward              on a GPU: check and time every variant
    python -m benchmarks.gluon_forward --compile    without one: registers, spills, where exp2 lies

Triton lets a program's softmax and products take turns. Gluon, its lower level, says itself when a
product starts and when it is waited for, as FlashAttention-3 does. One step of a walk over keys:

    start     s = q k'                 of this tile of keys
    start     acc += p v               of the tile before
    wait      for s alone
    softmax   of s                     while p v is still running
    wait      for acc, then scale it

A program has 16 heads x 8 tokens as rows. A walk begins at its last tile of keys, the only one that
needs a mask: tokens of one program see numbers of keys that differ by one at most. Variants:

    alone     8 warps do everything, the copies too
    two       two groups of 4 warps walk, 4 tokens each; one more warp asks for all copies (TMA)
    turns     as two, and the groups start products in turns: one's softmax, the other's products
    .. stay   as many programs as multiprocessors; each does tile after tile, so that the copies for
              the next one begin before the last is finished

With triton 3.6.0. Not general: 128 columns, half precision, queries from token 0, and R heads in a
group with 128 / R <= stride.
"""

import argparse
import re
import sys
from itertools import groupby
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import KernelInterface
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
D = gl.constexpr(128)  # columns
BLOCK_N = gl.constexpr(128)  # keys a step


class Sizes(NamedTuple):
    """Runtime sizes: groups, queries, keys, tiles of queries, and the scale times log2(e)."""

    G: int
    T: int
    S: int
    tiles: int
    scale: float


class Shape(NamedTuple):
    """Compile-time: heads of a group, tokens of a program, l and d, and how many k and v wait."""

    R: int
    BLOCK_T: int
    block_size: int
    stride: int
    k_stages: int
    v_stages: int
    turns: bool  # see `turns` above


# --- what the variants share ---


@gluon.jit
def keys_seen(t, sizes, SHAPE: gl.constexpr):
    """How many keys end at or before token t."""
    seen = gl.maximum(t + 1 - SHAPE.block_size + SHAPE.stride, 0) // SHAPE.stride
    return gl.minimum(seen, sizes.S)


@gluon.jit
def tile_at(index, sizes, SHAPE: gl.constexpr):
    """Batch entry, group, first token and tiles of keys (one at least); the longest come first."""
    pairs = sizes.tiles // gl.cdiv(sizes.T, SHAPE.BLOCK_T)
    first = (sizes.tiles - 1 - index) // pairs * SHAPE.BLOCK_T
    last = gl.minimum(first + SHAPE.BLOCK_T, sizes.T) - 1
    steps = gl.maximum(gl.cdiv(keys_seen(last, sizes, SHAPE), BLOCK_N), 1)
    pair = index % pairs
    return pair // sizes.G, pair % sizes.G, first, steps


@gluon.jit
def slot_of(ring, bars, step):
    """Where a step's tile of a ring lies, the barrier that tells of it, and that one's phase."""
    slots: gl.constexpr = ring.shape[0]
    return ring.index(step % slots), bars.index(step % slots), step // slots & 1


@gluon.jit
def wait_for(ring, full, step):
    """Wait until the tile of a step has come."""
    _, bar, phase = slot_of(ring, full, step)
    mbarrier.wait(bar, phase)


@gluon.jit
def keys_of(ring, step):
    """A step's tile of a ring as [BLOCK_N, D]."""
    return ring.index(step % ring.shape[0]).reshape([BLOCK_N, D])


@gluon.jit
def start_scores(q, ring, step, zeros):
    """Start s = q k' of a step."""
    k = keys_of(ring, step).permute([1, 0])
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def softmax(s, m_i, l_i, seen, first_key, scale, MASKED: gl.constexpr):
    """p, m and l as in online_softmax.py, and what the old sums are multiplied by."""
    if MASKED:
        key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        s = gl.where(key[None, :] < seen[:, None], s, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    m_safe = gl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = gl.exp2(s * scale - m_safe[:, None])
    alpha = gl.exp2(m_i - m_safe)
    return p, m_new, l_i * alpha + gl.sum(p, 1), alpha


@gluon.jit
def as_operand(p, dtype: gl.constexpr):
    """p as the first operand of a product, in the registers where it already is."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, p.type.layout, 2), True)


@gluon.jit
def store_tile(desc_out, lse, o_tile, at, sums, sizes, SHAPE: gl.constexpr):
    """Write out and lse of the rows that begin at `at`: batch entry, group, first token."""
    b, g, first = at
    acc, m_i, l_i = sums
    rows: gl.constexpr = acc.shape[0]
    tokens: gl.constexpr = rows // SHAPE.R
    seen = l_i > 0
    acc = acc * (1 / gl.where(seen, l_i, 1.0))[:, None]
    tma.store_wait(0)  # of the tile before
    o_tile.reshape([rows, D]).store(acc.to(desc_out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc_out, [b, g * SHAPE.R, first, 0], o_tile)
    row = gl.arange(0, rows, l_i.type.layout)
    token = first + row % tokens
    to = ((b * sizes.G + g) * SHAPE.R + row // tokens).to(gl.int64) * sizes.T + token
    row_lse = gl.where(seen, (m_i + gl.log2(gl.where(seen, l_i, 1.0))) * LN2, -float("inf"))
    gl.store(lse + to, row_lse, mask=token < sizes.T)


# --- two groups of warps that walk, and a warp that fetches ---


@gluon.jit
def fetch(desc_q, desc_k, desc_v, buffers, bars, sizes, SHAPE: gl.constexpr):
    """Ask for every tile of q, k and v as soon as there is room for it."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    step = 0
    for index in range(gl.program_id(0), sizes.tiles, gl.num_programs(0)):
        b, g, first, steps = tile_at(index, sizes, SHAPE)
        for me in gl.static_range(2):
            mbarrier.wait(q_empty.index(me), index // gl.num_programs(0) & 1 ^ 1)
            mbarrier.expect(q_full.index(me), desc_q.block_type.nbytes)
            at = [b, g * SHAPE.R, first + me * (SHAPE.BLOCK_T // 2), 0]
            tma.async_copy_global_to_shared(desc_q, at, q_full.index(me), q_tiles.index(me))
        for i in range(steps):
            at = [b, g, (steps - 1 - i) * BLOCK_N, 0]
            k_tile, bar, phase = slot_of(k_tiles, k_full, step)
            mbarrier.wait(k_empty.index(step % SHAPE.k_stages), phase ^ 1)
            mbarrier.expect(bar, desc_k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_k, at, bar, k_tile)
            v_tile, bar, phase = slot_of(v_tiles, v_full, step)
            mbarrier.wait(v_empty.index(step % SHAPE.v_stages), phase ^ 1)
            mbarrier.expect(bar, desc_v.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_v, at, bar, v_tile)
            step += 1


@gluon.jit
def walk(desc_out, lse, buffers, bars, sizes, SHAPE: gl.constexpr, ME: gl.constexpr):
    """out and lse of 64 rows: the first (ME 0) or the second (ME 1) half of a program's tokens."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    BLOCK_T: gl.constexpr = SHAPE.BLOCK_T // 2
    M: gl.constexpr = SHAPE.R * BLOCK_T
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    dtype: gl.constexpr = desc_out.dtype
    q = q_tiles.index(ME).reshape([M, D])
    o_tile = gl.allocate_shared_memory(dtype, desc_out.block_type.shape, desc_out.layout)
    token = gl.arange(0, M, gl.SliceLayout(1, MMA)) % BLOCK_T
    zeros = gl.zeros([M, D], gl.float32, MMA)
    if SHAPE.turns and ME == 1:
        mbarrier.arrive(turn.index(0))
    step = 0  # these count on from tile to tile
    turns = 0
    for index in range(gl.program_id(0), sizes.tiles, gl.num_programs(0)):
        b, g, first, steps = tile_at(index, sizes, SHAPE)
        first += ME * BLOCK_T
        seen = keys_seen(first + token, sizes, SHAPE)
        mbarrier.wait(q_full.index(ME), index // gl.num_programs(0) & 1)
        wait_for(k_tiles, k_full, step)
        s = warpgroup_mma_wait(0, (start_scores(q, k_tiles, step, zeros),))
        mbarrier.arrive(k_empty.index(step % SHAPE.k_stages))
        m_i = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, MMA))
        l_i = gl.zeros([M], gl.float32, gl.SliceLayout(1, MMA))
        first_key = (steps - 1) * BLOCK_N
        p, m_i, l_i, _ = softmax(s, m_i, l_i, seen, first_key, sizes.scale, True)
        p = as_operand(p, dtype)
        acc = zeros
        wait_for(v_tiles, v_full, step)
        for _ in range(1, steps):
            step += 1
            if SHAPE.turns:
                mbarrier.wait(turn.index(ME), turns & 1)
                turns += 1
            wait_for(k_tiles, k_full, step)
            s = start_scores(q, k_tiles, step, zeros)
            acc = warpgroup_mma(p, keys_of(v_tiles, step - 1), acc, is_async=True)
            if SHAPE.turns:
                mbarrier.arrive(turn.index(1 - ME))
            s = warpgroup_mma_wait(1, (s,))
            mbarrier.arrive(k_empty.index(step % SHAPE.k_stages))
            p, m_i, l_i, alpha = softmax(s, m_i, l_i, seen, 0, sizes.scale, False)
            # The assembler would move exp2 behind the wait for acc, but for this one in between.
            wait_for(v_tiles, v_full, step)
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(v_empty.index((step - 1) % SHAPE.v_stages))
            acc = acc * alpha[:, None]
            p = as_operand(p, dtype)
        mbarrier.arrive(q_empty.index(ME))
        acc = warpgroup_mma(p, keys_of(v_tiles, step), acc)
        mbarrier.arrive(v_empty.index(step % SHAPE.v_stages))
        store_tile(desc_out, lse, o_tile, (b, g, first), (acc, m_i, l_i), sizes, SHAPE)
        step += 1
    tma.store_wait(0)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each complete once it was arrived at ARRIVALS times."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), ARRIVALS)
    return bars


@gluon.jit
def room_for(desc, COUNT: gl.constexpr):
    """COUNT tiles of what a descriptor loads."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)


@gluon.jit
def forward_by_two(desc_q, desc_k, desc_v, desc_out, lse, sizes, SHAPE: gl.constexpr):
    """out and lse; 12 warps: two groups of 4 that walk, and 1 that fetches (3 are idle)."""
    NK: gl.constexpr = SHAPE.k_stages
    NV: gl.constexpr = SHAPE.v_stages
    buffers = (room_for(desc_q, 2), room_for(desc_k, NK), room_for(desc_v, NV))
    q_bars = (barriers(2, 1), barriers(2, 1))  # full and empty; both groups empty k and v
    kv_bars = (barriers(NK, 1), barriers(NK, 2), barriers(NV, 1), barriers(NV, 2))
    bars = q_bars + kv_bars + (barriers(2, 1),)
    gl.warp_specialize(
        [
            (walk, (desc_out, lse, buffers, bars, sizes, SHAPE, 0)),
            (walk, (desc_out, lse, buffers, bars, sizes, SHAPE, 1)),
            (fetch, (desc_q, desc_k, desc_v, buffers, bars, sizes, SHAPE)),
        ],
        [4, 1],
        [240, 24],
    )


# --- 8 warps that do everything ---


@gluon.jit
def ask(desc, ring, bars, b, g, step, steps):
    """Ask for the tile of keys of a step of the walk, if it has so many."""
    tile, bar, _ = slot_of(ring, bars, step)
    pred = step < steps
    mbarrier.expect(bar, desc.block_type.nbytes, pred)
    at = [b, g, (steps - 1 - step) * BLOCK_N, 0]
    tma.async_copy_global_to_shared(desc, at, bar, tile, pred)


@gluon.jit
def forward_alone(desc_q, desc_k, desc_v, desc_out, lse, sizes, SHAPE: gl.constexpr):
    """out and lse of one tile of 128 rows."""
    M: gl.constexpr = SHAPE.R * SHAPE.BLOCK_T
    NK: gl.constexpr = SHAPE.k_stages
    NV: gl.constexpr = SHAPE.v_stages
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    dtype: gl.constexpr = desc_q.dtype
    b, g, first, steps = tile_at(gl.program_id(0), sizes, SHAPE)
    q_tile = gl.allocate_shared_memory(dtype, desc_q.block_type.shape, desc_q.layout)
    k_tiles = room_for(desc_k, NK)
    v_tiles = room_for(desc_v, NV)
    q_full = barriers(1, 1)
    k_full = barriers(NK, 1)
    v_full = barriers(NV, 1)
    mbarrier.expect(q_full.index(0), desc_q.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_q, [b, g * SHAPE.R, first, 0], q_full.index(0), q_tile)
    for i in gl.static_range(NK):
        ask(desc_k, k_tiles, k_full, b, g, i, steps)
    for i in gl.static_range(NV):
        ask(desc_v, v_tiles, v_full, b, g, i, steps)

    q = q_tile.reshape([M, D])
    zeros = gl.zeros([M, D], gl.float32, MMA)
    token = gl.arange(0, M, gl.SliceLayout(1, MMA)) % SHAPE.BLOCK_T
    seen = keys_seen(first + token, sizes, SHAPE)
    mbarrier.wait(q_full.index(0), 0)
    wait_for(k_tiles, k_full, 0)
    s = warpgroup_mma_wait(0, (start_scores(q, k_tiles, 0, zeros),))
    ask(desc_k, k_tiles, k_full, b, g, NK, steps)
    m_i = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, MMA))
    l_i = gl.zeros([M], gl.float32, gl.SliceLayout(1, MMA))
    p, m_i, l_i, _ = softmax(s, m_i, l_i, seen, (steps - 1) * BLOCK_N, sizes.scale, True)
    p = as_operand(p, dtype)
    acc = zeros
    wait_for(v_tiles, v_full, 0)
    for step in range(1, steps):
        wait_for(k_tiles, k_full, step)
        s = start_scores(q, k_tiles, step, zeros)
        acc = warpgroup_mma(p, keys_of(v_tiles, step - 1), acc, is_async=True)
        s = warpgroup_mma_wait(1, (s,))
        ask(desc_k, k_tiles, k_full, b, g, step + NK, steps)
        p, m_i, l_i, alpha = softmax(s, m_i, l_i, seen, 0, sizes.scale, False)
        wait_for(v_tiles, v_full, step)  # as in `walk`
        acc = warpgroup_mma_wait(0, (acc,))
        ask(desc_v, v_tiles, v_full, b, g, step - 1 + NV, steps)
        acc = acc * alpha[:, None]
        p = as_operand(p, dtype)
    acc = warpgroup_mma(p, keys_of(v_tiles, steps - 1), acc)
    store_tile(desc_out, lse, q_tile, (b, g, first), (acc, m_i, l_i), sizes, SHAPE)
    tma.store_wait(0)


# --- their launch ---


class Variant(NamedTuple):
    """One way to start a kernel; `stages` of k and of v."""

    kernel: KernelInterface
    stages: tuple[int, int]
    options: dict
    turns: bool = False
    stay: bool = False


ALONE = {"num_warps": 8}
TWO = {"num_warps": 4, "maxnreg": 168}  # 12 warps x 168 = 8 x 240 + 4 x 24
VARIANTS = {
    "alone": Variant(forward_alone, (3, 3), ALONE),
    "two": Variant(forward_by_two, (2, 3), TWO),
    "two stay": Variant(forward_by_two, (2, 3), TWO, stay=True),
    "turns": Variant(forward_by_two, (2, 3), TWO, turns=True),
    "turns stay": Variant(forward_by_two, (2, 3), TWO, turns=True, stay=True),
}


def descriptor(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    """heads x tokens rows a load of x (B, H, T, 128)."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape = [1, heads, tokens, D.value]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


class Launch(NamedTuple):
    """A launch, and what it fills."""

    kernel: KernelInterface
    grid: tuple[int]
    arguments: tuple
    options: dict
    results: tuple[Tensor, Tensor]


def prepare(q: Tensor, k: Tensor, v: Tensor, block_size: int, stride: int, name: str) -> Launch:
    """The launch of a variant."""
    variant = VARIANTS[name]
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    R = heads // groups
    shape = Shape(R, 128 // R, block_size, stride, *variant.stages, variant.turns)
    assert width == v.shape[3] == D.value and shape.BLOCK_T <= stride and 64 % R == 0, "see the top"
    tokens = shape.BLOCK_T if variant.kernel is forward_alone else shape.BLOCK_T // 2
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles = triton.cdiv(length, shape.BLOCK_T) * batch * groups
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    arguments = (
        descriptor(q, R, tokens),
        descriptor(k, 1, BLOCK_N.value),
        descriptor(v, 1, BLOCK_N.value),
        descriptor(out, R, tokens),
        lse,
        Sizes(groups, length, k.shape[2], tiles, width**-0.5 * LOG2E.value),
        shape,
    )
    grid = (min(tiles, processors) if variant.stay else tiles,)
    return Launch(variant.kernel, grid, arguments, variant.options, (out, lse))


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int = 32, stride: int = 16, variant: str = "two"
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, 128) and lse (B, H, T) of the compressed branch, as compressed_attention."""
    start = prepare(q, k, v, block_size, stride, variant)
    start.kernel[start.grid](*start.arguments, **start.options)
    return start.results


# --- without a device, and with one ---


def compile_all(names: list[str]) -> None:
    """Registers, spills and products of each variant, and how many exp2 lie before which wait."""
    from benchmarks.compiled import Compiled, import_kernels_to_compile, resources, said_by

    import_kernels_to_compile(90)

    q = torch.zeros(1, 64, 2048, D.value, dtype=torch.bfloat16)
    k = torch.zeros(1, 4, 127, D.value, dtype=torch.bfloat16)
    card = mock.Mock(multi_processor_count=132)
    for name in names:
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=card):
            start = prepare(q, k, k, 32, 16, name)
        code = start.kernel.warmup(*start.arguments, grid=start.grid, **start.options)
        compiled = Compiled("gluon", name, code)
        print(*(f"{word} {number}" for word, number in resources(compiled).items()), sep="  ")
        text = said_by("cuobjdump", compiled, "-sass")
        words = re.findall(r"HGMMA|MUFU\.EX2|DEPBAR\.LE gsb0, 0x\d", text)
        print("   ", ", ".join(f"{len(list(run))} {word}" for word, run in groupby(words)))


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of config A, bfloat16."""
    make = torch.Generator("cuda").manual_seed(length)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16)

    keys = (length - 32) // 16 + 1
    return new(1, 64, length, 128), new(1, 4, keys, 128), new(1, 4, keys, 128)


def relative(x: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what was wanted; inf where infinities differ."""
    finite = wanted.isfinite()
    if not torch.equal(finite, x.isfinite()):
        return float("inf")
    x = torch.where(finite, x, 0).float()
    wanted = torch.where(finite, wanted, 0).float()
    return ((x - wanted).norm() / wanted.norm()).item()


def check(name: str, lengths: tuple[int, ...]) -> bool:
    """Whether a variant agrees with compressed_attention at these lengths."""
    from kernels import compressed_attention

    good = True
    for length in lengths:
        q, k, v = inputs(length)
        wanted = compressed_attention(q, k, v, block_size=32, stride=16)
        got = compressed_forward(q, k, v, 32, 16, name)
        out, lse = (relative(x, y) for x, y in zip(got, wanted, strict=True))
        good &= out <= 4e-3 and lse <= 1e-3
        print(f"{name:>10} T {length:>5}  out {out:.1e}  lse {lse:.1e}", flush=True)
    return good


def time_in_turns(names: list[str], length: int, rounds: int = 3) -> None:
    """Each one's median of every round, after compressed_attention's, in milliseconds."""
    from triton.testing import do_bench

    from kernels import compressed_attention

    q, k, v = inputs(length)
    runs = {"kernels": lambda: compressed_attention(q, k, v, block_size=32, stride=16)}
    for name in names:
        runs[name] = lambda name=name: compressed_forward(q, k, v, 32, 16, name)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(do_bench(run, warmup=50, rep=200, return_mode="median"))
    for name, taken in times.items():
        print(
            f"{name:>10} T {length:>5}  " + "  ".join(f"{t:.3f}" for t in taken) + " ms", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}: all")
    parser.add_argument("--compile", action="store_true", help="for an H100, on any machine")
    parser.add_argument("--check", action="store_true", help="do not time")
    args = parser.parse_args()
    names = args.variants or list(VARIANTS)
    if args.compile:
        compile_all(names)
        return 0
    if not torch.cuda.is_available():
        print("error: no CUDA device; `--compile` needs none", file=sys.stderr)
        return 2
    right = [name for name in names if check(name, (1000, 4096, 65536))]
    print("wrong:", ", ".join(name for name in names if name not in right) or "none", flush=True)
    for length in () if args.check else (8192, 65536):
        time_in_turns(right, length)
    return 0 if right == names else 1


if __name__ == "__main__":
    sys.exit(main())
