"""The numbers that define one NSA layer, checked once, when they are written down."""

from dataclasses import asdict, dataclass, fields

from nsa_lite.checks import require, require_int

PHIS = ("mlp", "mean+mlp")  # the paper's; and ours, which adds the block's mean


@dataclass(frozen=True)
class NSAConfig:
    """The sizes of one NSA layer; the defaults are the paper's 27B model (section 4.1).

    Errors: a field that is no int is a TypeError, one that breaks a rule a ValueError;
    both name the field, the value and the rule.
    """

    dim: int = 2560  # C, width of the layer's input
    heads: int = 64  # H, query heads
    kv_heads: int = 4  # G, key/value heads: one group of H/G query heads each
    head_dim: int = 192  # D, width of queries and keys
    value_dim: int = 128  # Dv, width of values
    block_size: int = 32  # l, tokens in a compression block
    stride: int = 16  # d, tokens from one compression block to the next
    select_block_size: int = 64  # l', tokens in a selection block
    num_selected: int = 16  # n, selected blocks, forced ones included
    num_initial: int = 1  # forced blocks at the start of the sequence
    num_local: int = 2  # forced blocks up to the query's own
    window: int = 512  # w, keys in the window, the query's own included
    rope_theta: int = 10_000  # base of the rotary position encoding
    phi: str = "mlp"  # how a block becomes one token: one of PHIS

    def __post_init__(self) -> None:
        require(self.phi in PHIS, "phi", repr(self.phi), f"must be one of {PHIS}")
        for field in fields(self):
            if field.type is int:
                lowest = 0 if field.name in ("num_initial", "num_local") else 1
                require_int(field.name, getattr(self, field.name), at_least=lowest)
        self._check_rules()

    def _check_rules(self) -> None:
        l, d, l_sel = self.block_size, self.stride, self.select_block_size  # noqa: E741
        require(
            self.heads % self.kv_heads == 0,
            "heads",
            self.heads,
            f"must be a multiple of kv_heads = {self.kv_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "must be even: rotary encoding turns pairs",
        )
        require_geometry(l, d, l_sel)
        require_counts(self.num_selected, self.num_initial, self.num_local)

    @property
    def group_size(self) -> int:
        """R, query heads in a group."""
        return self.heads // self.kv_heads

    @classmethod
    def small(cls, **changes: int | str) -> "NSAConfig":
        """A layer small enough to print and to train on a laptop; `changes` override fields."""
        sizes = dict(
            dim=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            value_dim=16,
            block_size=8,
            stride=4,
            select_block_size=8,
            num_selected=5,
            window=16,
        )
        return cls(**{**sizes, **changes})

    def as_dict(self) -> dict[str, int | str]:
        """The fields by name, for a log or a checkpoint."""
        return asdict(self)


def require_geometry(block_size: int, stride: int, select_block_size: int | None = None) -> None:
    """Raise unless d divides l and l', and l <= l' (the paper's conditions on Eq. 9)."""
    require_int("block_size", block_size, at_least=1)
    require_int("stride", stride, at_least=1)
    require(block_size % stride == 0, "stride", stride, f"must divide block_size = {block_size}")
    if select_block_size is None:
        return
    require_int("select_block_size", select_block_size, at_least=1)
    require(
        select_block_size % stride == 0,
        "select_block_size",
        select_block_size,
        f"must be a multiple of stride = {stride}",
    )
    require(
        block_size <= select_block_size,
        "block_size",
        block_size,
        f"must not exceed select_block_size = {select_block_size}",
    )


def require_counts(num_selected: int, num_initial: int, num_local: int) -> None:
    """Raise unless the forced blocks fit inside the n selected ones."""
    require_int("num_selected", num_selected, at_least=1)
    require_int("num_initial", num_initial, at_least=0)
    require_int("num_local", num_local, at_least=0)
    require(
        num_selected >= num_initial + num_local,
        "num_selected",
        num_selected,
        f"must be at least num_initial + num_local = {num_initial + num_local}",
    )
