"""Two made-up machines for set 12: a card to be timed, and a program whose copies take time.

Both count by clocks of their own, so that every run of a check gives the same numbers.
"""

HOST = 0.01  # milliseconds of the host for one launch
READ = 0.001  # for one look at the clock
EMPTY = 0.3  # of the card, to write over its cache
COMPILE = 500.0  # of the host, at the first launch of a kernel
SLOW = 0.1  # how much slower the card has become when it is warm
WARM_AFTER = 40  # launches
KNOCK = 7  # at every seventh launch something else disturbs the card
HIT = 0.6  # the share of the time that remains where the cache holds the inputs


class Card:
    """launch(kernel) and empty_cache() return at once; synchronize() waits for the card."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times = times
        self.host = 0.0
        self.end = 0.0  # when the card has done all that was launched
        self.launches = 0
        self.seen: dict[str, int] = {}
        self.is_cached = False  # whether the inputs, which all kernels share, lie in the cache
        self.waits = 0

    def launch(self, kernel: str) -> None:
        """Put a kernel into the card's queue."""
        count = self.seen.get(kernel, 0)
        self.seen[kernel] = count + 1
        if count == 0:
            self.host += COMPILE
        self.host += HOST
        self.queue(self.duration(kernel, count))
        self.launches += 1
        self.is_cached = True

    def duration(self, kernel: str, count: int) -> float:
        """What this launch takes: slower as the card warms up, less if the inputs are cached."""
        time = self.times[kernel] * (1 + SLOW * min(1, self.launches / WARM_AFTER))
        if self.is_cached:
            time *= HIT
        if count < 2:
            time *= 4  # memory is taken for the first time
        if self.launches % KNOCK == KNOCK - 1:
            time *= 8
        return time

    def empty_cache(self) -> None:
        """Write over the whole cache, behind what is queued."""
        self.host += HOST
        self.queue(EMPTY)
        self.is_cached = False

    def queue(self, time: float) -> None:
        """The card begins when it is free."""
        self.end = max(self.end, self.host) + time

    def synchronize(self) -> None:
        """Wait until the card has done all."""
        self.host = max(self.host, self.end)
        self.waits += 1

    def now(self) -> float:
        """The host's clock, in milliseconds."""
        self.host += READ
        return self.host


class Copies:
    """load(tile, slot) begins a copy and returns; wait(slot); multiply(slot).

    Copies pass through memory one after another, `copy` clocks each, and arrive `latency` clocks
    after they have passed. A product takes `product` clocks.
    """

    def __init__(self, tiles: int, stages: int, copy: int, latency: int, product: int) -> None:
        self.tiles = tiles
        self.stages = stages
        self.copy = copy
        self.latency = latency
        self.product = product
        self.clock = 0
        self.memory = 0  # when the memory is free
        self.slots: dict[int, tuple[int, int]] = {}  # a slot's tile, and when it arrives
        self.fresh: set[int] = set()  # slots whose tile nobody has multiplied
        self.waited: set[int] = set()
        self.done: list[int] = []
        self.said = ""

    def say(self, text: str) -> None:
        """Remember what was wrong first."""
        self.said = self.said or text

    def load(self, tile: int, slot: int) -> None:
        """Begin the copy of a tile into a slot."""
        if not 0 <= slot < self.stages:
            self.say(f"there is no slot {slot}: there are 0 to {self.stages - 1}")
        if not 0 <= tile < self.tiles:
            self.say(f"there is no tile {tile}: there are {self.tiles}")
        if slot in self.fresh:
            self.say(f"slot {slot} was loaded anew before its tile {self.slots[slot][0]} was used")
        self.memory = max(self.memory, self.clock) + self.copy
        self.slots[slot] = (tile, self.memory + self.latency)
        self.fresh.add(slot)
        self.waited.discard(slot)

    def wait(self, slot: int) -> None:
        """Go on when the slot's tile has arrived."""
        if slot not in self.slots:
            self.say(f"slot {slot} was waited for, and nothing was loaded into it: for ever")
            return
        self.clock = max(self.clock, self.slots[slot][1])
        self.waited.add(slot)

    def multiply(self, slot: int) -> None:
        """Use the slot's tile."""
        if slot not in self.slots:
            self.say(f"slot {slot} was used, and nothing was loaded into it")
            return
        tile, _ = self.slots[slot]
        if slot not in self.waited:
            self.say(f"tile {tile} was used without a wait for its slot: it may not have arrived")
        self.fresh.discard(slot)
        self.clock += self.product
        self.done.append(tile)

    def end(self, enough: int) -> str:
        """What was wrong; "" if nothing was."""
        if self.said:
            return self.said
        if self.done != list(range(self.tiles)):
            return wrong_tiles(self.done, self.tiles)
        if self.clock > enough:
            return (
                f"it took {self.clock} clocks, and {enough} are enough: which copies are on their "
                "way while you multiply?"
            )
        return ""


def wrong_tiles(done: list[int], tiles: int) -> str:
    """What is wrong with the tiles that were multiplied."""
    for tile in range(tiles):
        if done.count(tile) != 1:
            return f"tile {tile} was used {done.count(tile)} times"
    return f"the tiles were used in the order {done}"
