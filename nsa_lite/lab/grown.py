"""A training whose compressed blocks grow on the way: what it learned with a smaller l goes on.

Only phi depends on l. All other weights, and what AdamW knows of them, are kept; a larger phi is
new, as a run of that l would begin with.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from nsa_lite.lab.checkpoint import load, write
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.runs import Run, training_result
from nsa_lite.lab.training import TrainConfig, build, progress_of, steps
from nsa_lite.model import DecoderLM

CHECKPOINT = "checkpoint.safetensors"
SMALL = "small"  # where in a run's folder its first part works


def grown_run(first: TrainConfig, then: TrainConfig, at: int, name: str, minutes: float) -> Run:
    """Trained as `first` says up to the step `at`, from there as `then` says; one curriculum."""

    def work(folder: Path) -> Generator[dict, None, None]:
        if not (folder / CHECKPOINT).exists():
            yield from steps_until(at, first, folder / SMALL)
            grow(folder / SMALL / CHECKPOINT, first, then, folder / CHECKPOINT)
        yield from steps(then, folder, resume=True)
        _, state = load(folder / CHECKPOINT)
        yield training_result(state, read_log(folder / SMALL) + read_log(folder))

    settings = {"first": first.everything(), "then": then.everything(), "at": at}
    return Run(name, then.steps, work, settings, minutes)


def steps_until(at: int, config: TrainConfig, folder: Path) -> Generator[dict, None, None]:
    """The first steps of a run, or those of them that are left; a checkpoint stands at the last."""
    path = folder / CHECKPOINT
    if path.exists() and load(path)[1]["step"] == at:
        return
    with closing(steps(config, folder, resume=True)) as records:
        for record in records:
            yield record
            if record["step"] == at:
                return


def grow(small: Path, first: TrainConfig, then: TrainConfig, large: Path) -> None:
    """Write the checkpoint from which a run of other sizes goes on where a run has stopped."""
    tensors, state = load(small)
    progress = progress_of(small, state, first)
    settings = {"config": then.everything(), **asdict(progress)}
    write(large, fitted(tensors, build(then)), settings)


def fitted(tensors: dict[str, Tensor], model: DecoderLM) -> dict[str, Tensor]:
    """What of a checkpoint fits a model of other sizes; the model's own weights for the rest."""
    new = {f"model.{name}": t for name, t in model.state_dict().items()}
    kept = {name: t for name, t in tensors.items() if name in new and t.shape == new[name].shape}
    for i, (name, _) in enumerate(model.named_parameters()):
        if f"model.{name}" in kept:
            of_it = f"optimizer.{i}."
            kept |= {slot: t for slot, t in tensors.items() if slot.startswith(of_it)}
    return new | kept | {"random": tensors["random"]}
