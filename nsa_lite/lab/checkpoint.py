"""Checkpoints: tensors and a small JSON header in one safetensors file, never pickled code.

A sum over all of it (SHA-256) stands in the header, so that a flipped bit does not load unseen.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nsa_lite.config import NSAConfig

FORMAT = "nsa_lite checkpoint 2"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file and the reason."""


def save(path: Path, model: nn.Module, optimizer: Optimizer, state: dict) -> None:
    """Write weights, optimizer, torch's random state and `state` (JSON) to `path`, atomically.

    Whatever interrupts it, `path` holds either the old checkpoint or the new one, whole.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{slot}": t for slot, t in slots.items()}
    tensors["random"] = torch.get_rng_state()
    write(path, tensors, state)


def save_weights(path: Path, model: nn.Module, state: dict) -> None:
    """Write a model's weights alone, in 16 bits, and `state` (JSON): small enough to be shipped."""
    tensors = {f"model.{name}": t.half() for name, t in model.state_dict().items()}
    write(path, tensors, state)


def write(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write tensors and `state` to `path`, which then holds all of it, or what it held before."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    part = path.with_suffix(".part")
    header = {"format": FORMAT, "state": json.dumps(state)}
    save_file(tensors, part, metadata={**header, "sha256": checksum(tensors, header["state"])})
    with open(part, "rb+") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())  # on disk before the name changes hands
    os.replace(part, path)


def checksum(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 of every tensor's name and bytes, in the order of names, and of the state."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state of a checkpoint; the file is only read, and free again after it.

    Errors: CheckpointError for a file that is damaged, or that something else wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: not a checkpoint of this program "
                    f"(format {header.get('format')!r}, expected {FORMAT!r}); left untouched"
                )
            state = json.loads(header["state"])
            # A copy: the file's own tensors keep it mapped, and Windows replaces no mapped file.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged or unreadable ({error}); left untouched") from error
    if checksum(tensors, header["state"]) != header.get("sha256"):
        raise CheckpointError(f"{path}: damaged, its checksum does not fit; left untouched")
    return tensors, state


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict among the tensors that `load` returns."""
    return {
        name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")
    }


def require_config(path: Path, state: dict, config: dict) -> None:
    """Raise a CheckpointError that says what differs, unless `config` is the checkpoint's."""
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path}: its header names no config; left untouched")
    if what := difference(as_today(state["config"]), config):
        raise CheckpointError(f"{path}: made with {what}; left untouched")


def difference(saved: dict, asked: dict) -> str | None:
    """The first field in which two configs differ, with both values; None where they agree.

    They are compared as JSON holds them, which has lists for tuples.
    """
    old = flat(json.loads(json.dumps(saved)))
    new = flat(json.loads(json.dumps(asked)))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} = {old.get(name)}, asked for {new.get(name)}"
    return None


def flat(config: dict, prefix: str = "") -> dict:
    """A nested config with dotted names: {"nsa": {"dim": 64}} becomes {"nsa.dim": 64}."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def as_today(config: dict) -> dict:
    """A saved config with the fields that layers have got since then, at their defaults."""
    if "nsa" not in config:
        return config
    return config | {"nsa": NSAConfig().as_dict() | config["nsa"]}


def restore(path: Path, model: nn.Module, optimizer: Optimizer, config: dict) -> dict:
    """Load `path` into a model and an optimizer made from the same config; return its state.

    Errors: CheckpointError when the file's config differs, naming the first field that does, and
    when entries are missing, renamed or of other shapes.
    """
    tensors, state = load(path)
    require_config(path, state, config)
    slots: dict[int, dict[str, Tensor]] = {}
    try:
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = tensor
        model.load_state_dict(weights(tensors))
        require_slots(slots, list(model.parameters()))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        torch.set_rng_state(tensors["random"])
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not all of a run ({reason}); left untouched") from error
    return state


def require_slots(slots: dict[int, dict[str, Tensor]], parameters: list[nn.Parameter]) -> None:
    """Raise a ValueError unless each parameter has all that AdamW keeps of it, in its shape."""
    for i, parameter in enumerate(parameters):
        shapes = {name: slot.shape for name, slot in slots.get(i, {}).items()}
        expected = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if shapes and shapes != expected:  # none of a parameter that had no gradient yet
            raise ValueError(f"optimizer.{i} has {shapes}, expected {expected}")
