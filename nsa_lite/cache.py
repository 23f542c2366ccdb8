"""What a layer keeps of the tokens it has read, so that the next ones need not read them again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa_lite.attention import KV
from nsa_lite.blocks import num_compressed
from nsa_lite.checks import (
    FLOATS,
    INTS,
    MOST,
    readable,
    require,
    require_alike,
    require_int,
)

WriteRows = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]


@dataclass(eq=False, repr=False)
class Cache:
    """One layer's keys and values so far: allocated once, by the layer's new_cache; calls fill it.

    Token s of a sequence stands in row s, block i in row i; rows behind a sequence's length may
    hold anything. All tokens of all branches stay, so that any of them can be cut off again; a
    cache that only grows would do with fewer (cost.cache_bytes): all of the selected branch's, the
    window's last w, phi's blocks and the tokens behind its last stride, fewer than l.
    A call that fails leaves the lengths as they were, and with them all that the cache holds.

    Shapes: raw by branch (B, G, capacity, width), blocks (B, G, capacity / d rounded up, width),
    x (B, capacity, C) only where a rule for choosing blocks may read all inputs, lengths (B,) int64
    on the device. lengths_on_host are the same numbers on the CPU: who decides by them does not
    wait for the device. Change them by `cut` only: lengths that differ are refused where that can
    be seen without waiting, on a CPU.
    """

    raw: dict[str, KV]
    blocks: KV | None
    x: Tensor | None
    lengths: Int[Tensor, " B"]
    lengths_on_host: Int[Tensor, " B"]
    owner: int | None = None  # id of the layer that fills it

    def __getstate__(self) -> dict:
        """What a copy or a file of the cache has: a layer's id would mean nothing there.

        Of a slot it has the slot's own rows, not the whole cache's memory.
        """
        own = {id(kv): KV(*(own_memory(x) for x in kv)) for kv in self.raw.values()}
        return vars(self) | {
            "raw": {name: own[id(kv)] for name, kv in self.raw.items()},
            "blocks": None if self.blocks is None else KV(*(own_memory(x) for x in self.blocks)),
            "x": None if self.x is None else own_memory(self.x),
            "lengths": own_memory(self.lengths),
            "lengths_on_host": own_memory(self.lengths_on_host),
            "owner": None,
        }

    def __repr__(self) -> str:
        return f"Cache(lengths = {self.lengths_on_host.tolist()}, capacity = {self.capacity})"

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return next(iter(self.raw.values())).k.shape[2]

    @property
    def length(self) -> int:
        """Tokens that every sequence holds. Errors: ValueError if their numbers differ."""
        lengths = self.lengths_on_host.tolist()
        require(len(set(lengths)) == 1, "cache.lengths", lengths, "must all be the same here")
        return lengths[0]

    # --- what a user does with it ---

    def cut(self, lengths: int | Sequence[int] | Int[Tensor, " B"]) -> None:
        """Forget all but the first tokens of each sequence, as many as `lengths` say.

        Speculative decoding takes back what was rejected; a batch of prompts that are padded at the
        right is cut to the real ones. Errors: ValueError or TypeError that names `lengths`.
        """
        new = lengths_of(lengths, len(self.lengths_on_host))
        held = self.lengths_on_host
        fits = bool(((new >= 0) & (new <= held)).all())
        rule = "must lie between 0 and what each sequence holds, {}"
        require(fits, "lengths", new.tolist(), rule, held.tolist())
        self.put_lengths(new)

    def slots(self, first: int, end: int) -> "Cache":
        """The sequences first .. end - 1 as a cache that shares this one's memory, lengths too.

        What is cut or grown in one is so in the other: a server clears a slot whose sequence has
        ended and prefills the next one there, while the others wait.
        Errors: ValueError or TypeError that names the argument.
        """
        require_int("first", first, at_least=0)
        require_int("end", end, at_least=first + 1)
        batch = len(self.lengths_on_host)
        require(end <= batch, "end", end, f"must not exceed the {batch} sequences of the cache")
        views = {id(kv): KV(kv.k[first:end], kv.v[first:end]) for kv in self.raw.values()}
        return Cache(
            {name: views[id(kv)] for name, kv in self.raw.items()},
            None if self.blocks is None else KV(*(x[first:end] for x in self.blocks)),
            None if self.x is None else self.x[first:end],
            self.lengths[first:end],
            self.lengths_on_host[first:end],
            self.owner,
        )

    def memory(self) -> dict[str, int]:
        """Bytes of the whole capacity, by what they are for; memory that two share counts once.

        "compressed": phi's blocks; "phi's tokens": what phi makes them of; "selected" and "window":
        those branches' raw keys and values; "inputs": x, for a rule.
        """
        found = {}
        if self.blocks is not None:
            found["compressed"] = sum(x.nbytes for x in self.blocks)
        for branch, kv in self.raw.items():
            name = "phi's tokens" if branch == "compressed" else branch
            found[name] = sum(x.nbytes for x in kv)
        if shares_window(self.raw):
            found["window"] = 0  # it lies in the selected branch's
        if self.x is not None:
            found["inputs"] = self.x.nbytes
        return found

    # --- what a layer does with it ---

    def require_room(self, layer: nn.Module, x: Tensor) -> None:
        """Raise unless the cache is `layer`'s, from now on, and has room for x (B, T, C)."""
        mine = self.owner in (None, id(layer))
        require(mine, "cache", type(self).__name__, "another layer fills it; each has its own")
        batch = len(self.lengths_on_host)
        require(batch == x.shape[0], "cache.lengths", f"{batch} of them", BATCH, x.shape[0])
        here = self.lengths.device == x.device
        where = self.lengths.device
        require(here, "cache.lengths.device", where, f"must be x.device = {x.device}")
        self.require_free(x.shape[1])
        self.owner = id(layer)

    def require_same_lengths(self) -> None:
        """Raise if the lengths are not those on the host: somebody has set one of them.

        On a device their numbers are not looked at, for that would wait.
        """
        held = self.lengths_on_host
        same = self.lengths.shape == held.shape
        if same and self.lengths.is_cpu and readable(self.lengths):
            same = torch.equal(self.lengths, held)
        rule = "must be lengths_on_host, {}: cut changes both"
        require(same, "cache.lengths", self.lengths, rule, held)

    def require_free(self, count: int) -> None:
        """Raise unless `count` more tokens fit behind the longest sequence."""
        held = int(self.lengths_on_host.max())
        rule = f"holds {held} of {self.capacity} tokens, {count} more do not fit"
        require(held + count <= self.capacity, "cache", type(self).__name__, rule)

    def next_positions(self, count: int) -> Int[Tensor, "B {count}"]:
        """Where each sequence's next tokens stand."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def grow(
        self, new: dict[str, KV], x: Tensor | None = None, write: WriteRows | None = None
    ) -> None:
        """Write the newest tokens' keys and values, and inputs, behind the others of each sequence.

        `write` is the backend's write_rows, this file's if None.
        Errors: ValueError or TypeError, before anything is written, if they do not belong here.
        """
        self.require_alike(new)
        if x is not None and self.x is not None:
            require_inputs_like(self.x, x)
        count = next(iter(new.values())).k.shape[2]
        positions = self.next_positions(count)
        own = [name for name in new if not (name == "window" and shares_window(new))]
        buffers = [rows for name in own for rows in self.raw[name]]
        (write or write_rows)(buffers, [rows for name in own for rows in new[name]], positions)
        if x is not None and self.x is not None:
            self.x[sequences(positions), positions] = x
        self.lengths += count
        self.lengths_on_host += count

    def ends_blocks(self, count: int, block_size: int, stride: int) -> bool:
        """Whether the next `count` tokens end a block of any sequence."""

        def whole(length: int) -> int:
            return num_compressed(length, block_size, stride)

        return any(whole(n + count) > whole(n) for n in self.lengths_on_host.tolist())

    def next_blocks(self, count: int, block_size: int, stride: int) -> Int[Tensor, "B M"]:
        """The M blocks that each sequence's newest `count` tokens may have ended.

        M = count / d rounded up, whatever the lengths: the last ones may not be whole yet.
        """
        before = self.lengths - count
        done = ((before - block_size).div(stride, rounding_mode="floor") + 1).clamp(min=0)
        return done[:, None] + torch.arange(-(-count // stride), device=done.device)

    def tokens_of(self, blocks: Int[Tensor, "B M"], block_size: int, stride: int) -> KV:
        """The tokens that phi makes these blocks of: (B, G, (M - 1) d + l, width)."""
        count = (blocks.shape[1] - 1) * stride + block_size
        tokens = blocks[:, :1] * stride + torch.arange(count, device=blocks.device)
        tokens = tokens.clamp(max=self.capacity - 1)  # of blocks that nobody may read yet
        owners = sequences(tokens)
        return KV(*(x[owners, :, tokens].transpose(1, 2) for x in self.raw["compressed"]))

    def write_blocks(self, new: KV, blocks: Int[Tensor, "B M"]) -> None:
        """Put phi's blocks in their rows; one that is not whole yet will be written again."""
        assert self.blocks is not None  # require_blocks has seen to it
        write_rows(self.blocks, new, blocks)

    def of_one_length(self) -> Iterator[tuple[slice, "Cache"]]:
        """This cache if all sequences are equally long, else one for each, with their slice."""
        if len(set(self.lengths_on_host.tolist())) == 1:
            yield slice(None), self
            return
        for b in range(len(self.lengths_on_host)):
            yield slice(b, b + 1), self.slots(b, b + 1)

    def held(self) -> dict[str, KV]:
        """Each branch's keys and values without the rows behind the length, which is one."""
        return {name: KV(*(x[:, :, : self.length] for x in kv)) for name, kv in self.raw.items()}

    def put_lengths(self, lengths: Tensor) -> None:
        """Change both copies of the lengths in place."""
        self.lengths_on_host.copy_(lengths)
        self.lengths.copy_(self.lengths_on_host)

    def require_alike(self, new: dict[str, KV]) -> None:
        """Raise unless these keys and values of a layer can stand in this cache."""
        named = sorted(self.raw)
        require(named == sorted(new), "cache.raw", named, f"must have the branches {sorted(new)}")
        shared = shares_window(self.raw)
        rule = "the window must share the selected branch's memory as the layer's config says"
        require(shared == shares_window(new), "cache.raw['window']", None, rule)
        for name, kv in new.items():
            require_rows_like(f"cache.raw[{name!r}]", self.raw[name], kv, self.capacity)

    def require_blocks(self, tokens: KV, stride: int) -> None:
        """Raise unless there is room for phi of all such tokens as the cache has room for."""
        if self.blocks is None:
            raise ValueError("cache.blocks = None: must have room for phi of every block")
        rows = blocks_for(self.capacity, stride)
        require_rows_like("cache.blocks", self.blocks, tokens, rows)


BATCH = "must be one for each of x's {} sequences"


def new_cache(
    layer: nn.Module,
    batch: int,
    capacity: int,
    shape: tuple[int, int, int],
    branches: Sequence[str],
    dtype: torch.dtype | None,
) -> Cache:
    """An empty cache of a layer, without blocks and inputs, on its device, in its dtype or another.

    shape is (G, D, Dv). Errors: ValueError or TypeError that names the argument.
    """
    require_int("batch", batch, at_least=1)
    require_int("capacity", capacity, at_least=1)
    require_dtype(dtype)
    like = home_of(layer)
    raw = {name: empty_rows(batch, capacity, shape, like, dtype) for name in branches}
    lengths_on_host = torch.zeros(batch, dtype=torch.int64, device="cpu")
    lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
    return Cache(raw, None, None, lengths, lengths_on_host, id(layer))


def require_dtype(dtype: object) -> None:
    """Raise unless dtype is None or a floating-point type of torch."""
    if not (dtype is None or dtype in FLOATS):
        raise TypeError(f"dtype = {dtype!r}: must be None or a floating-point type of torch")


def own_memory(x: Tensor) -> Tensor:
    """x, or a copy if it is a part of something larger."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def empty_rows(
    batch: int,
    rows: int,
    shape: tuple[int, int, int],
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> KV:
    """Room for so many keys (B, G, rows, D) and values (B, G, rows, Dv), with anything in it."""
    groups, *widths = shape
    return KV(*(like.new_empty(batch, groups, rows, width, dtype=dtype) for width in widths))


def home_of(layer: nn.Module) -> Tensor:
    """A tensor with the dtype and on the device of a layer's weights."""
    floats = (p for p in layer.parameters() if p.is_floating_point())
    return next(floats, torch.empty(0))


def shares_window(raw: dict[str, KV]) -> bool:
    """Whether the window reads the selected branch's keys and values."""
    return "window" in raw and raw["window"] is raw.get("selected")


def sequences(rows: Int[Tensor, "B n"]) -> Int[Tensor, "B 1"]:
    """The sequence that each of the rows belongs to; with the rows an index into buffers."""
    return torch.arange(rows.shape[0], device=rows.device)[:, None]


def write_rows(
    buffers: Sequence[Float[Tensor, "B G capacity _"]],
    new: Sequence[Float[Tensor, "B G n _"]],
    places: Int[Tensor, "B n"],
) -> None:
    """Write row i of sequence b of each new tensor into row places[b, i] of its buffer."""
    for buffer, x in zip(buffers, new, strict=True):
        buffer[sequences(places), :, places] = x.transpose(1, 2)


def blocks_for(capacity: int, stride: int) -> int:
    """Rows for phi's blocks of so many tokens, and for those that are not whole yet."""
    return -(-capacity // stride)


def require_rows_like(argument: str, buffers: KV, new: KV, rows: int) -> None:
    """Raise unless these are so many rows of keys and values like new ones (B, G, T, width)."""
    for name, buffer, x in zip(("k", "v"), buffers, new, strict=True):
        require_alike(f"{argument}.{name}", buffer, f"the new {name}", x)
        expected = (*x.shape[:2], rows, x.shape[3])
        rule = "must be (B, G, rows, width) = {}, as this layer's config says"
        fits = buffer.shape == expected
        require(fits, f"{argument}.{name}.shape", tuple(buffer.shape), rule, expected)


def require_inputs_like(buffer: Tensor | None, x: Tensor) -> None:
    """Raise unless inputs like x (B, T, C) fit into a buffer of them (B, capacity, C)."""
    if buffer is None:
        rule = "a rule for choosing blocks may read all inputs: make the cache when it is set"
        raise ValueError(f"cache.x = None: {rule}")
    require_alike("cache.x", buffer, "x", x)
    fits = buffer.shape[::2] == x.shape[::2]
    expected = (x.shape[0], "capacity", x.shape[2])
    rule = "must be (B, capacity, C) = {}, as this layer's config says"
    require(fits, "cache.x.shape", tuple(buffer.shape), rule, expected)


def lengths_of(lengths: object, batch: int) -> Tensor:
    """One length a sequence, on the CPU, from an int, a list or a tensor of ints."""
    each = [lengths] * batch if type(lengths) is int else lengths
    given = each
    if isinstance(each, list | tuple) and all(type(n) is int for n in each):
        require(all(abs(n) <= MOST for n in each), "lengths", lengths, f"must be at most {MOST}")
        given = torch.tensor(each, dtype=torch.int64)
    if not isinstance(given, Tensor) or given.dtype not in INTS:
        raise TypeError(f"lengths = {lengths!r}: must be an int or one int a sequence")
    rule = f"must be one for each of {batch} sequences"
    require(given.shape == (batch,), "lengths.shape", tuple(given.shape), rule)
    require(not given.is_meta, "lengths.device", given.device, "must hold numbers")
    return given.cpu().long()


@contextmanager
def growing(caches: Sequence[Cache | None]) -> Iterator[None]:
    """What is done inside with caches leaves no history; if it fails, they are as before.

    Without caches it is as if this were not here.
    """
    given = [cache for cache in caches if cache is not None]
    for cache in given:
        if not isinstance(cache, Cache):
            got = type(cache).__name__
            raise TypeError(f"cache: must be a Cache, as a layer's new_cache makes it, got {got}")
        cache.require_same_lengths()
    if not given:
        yield
        return
    before = [(cache.lengths_on_host.clone(), cache.owner) for cache in given]
    with torch.no_grad():
        try:
            yield
        except BaseException:
            for cache, (lengths, owner) in zip(given, before, strict=True):
                cache.put_lengths(lengths)
                cache.owner = owner  # who was refused does not keep it
            raise
