"""The numbers that define one NSA layer, checked once, when they are written down."""

from dataclasses import asdict, dataclass, fields

from nsa_lite.checks import (
    require,
    require_counts,
    require_geometry,
    require_instance,
    require_int,
)

PHIS = ("mlp", "mean+mlp", "mean")  # the paper's; and ours: with the block's mean, or that alone


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
    share_window: bool = False  # ours: the window reads the selected branch's keys and values

    def __post_init__(self) -> None:
        require(self.phi in PHIS, "phi", repr(self.phi), f"must be one of {PHIS}")
        if not isinstance(self.share_window, bool):
            raise TypeError(f"share_window = {self.share_window!r}: must be True or False")
        for field in fields(self):
            if field.type is int:
                lowest = 0 if field.name in ("num_initial", "num_local") else 1
                require_int(field.name, getattr(self, field.name), at_least=lowest)
        whole = self.heads % self.kv_heads == 0
        require(whole, "heads", self.heads, f"must be a multiple of kv_heads = {self.kv_heads}")
        rule = "must be even: rotary encoding turns pairs"
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, rule)
        require(self.dim >= 2, "dim", self.dim, "must be at least 2: the gate's MLP has dim // 2")
        require_geometry(self.block_size, self.stride, self.select_block_size)
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

    @property
    def choice_sizes(self) -> dict[str, int]:
        """The keywords of choose_blocks (Eq. 11)."""
        return dict(
            select_block_size=self.select_block_size,
            num_selected=self.num_selected,
            num_initial=self.num_initial,
            num_local=self.num_local,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The keywords of nsa_attention (Eq. 5)."""
        compression = dict(block_size=self.block_size, stride=self.stride)
        return {**compression, **self.choice_sizes, "window_size": self.window}

    def as_dict(self) -> dict[str, int | str]:
        """The fields by name, for a log or a checkpoint."""
        return asdict(self)


def require_config(config: object) -> None:
    """Raise unless `config` is an NSAConfig, made already."""
    require_instance("config", config, NSAConfig, "an NSAConfig")
