"""Train small models on a toy task, side by side, and resume after any interruption.

python -m nsa_lite.lab.train --task recall --attention nsa --attention dense --attention window
"""

import argparse
import json
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.lab.checkpoint import CheckpointError, load, restore, save
from nsa_lite.lab.tasks import IGNORE, Batch, Copy, Needle, Recall
from nsa_lite.lab.text import Text
from nsa_lite.layer import Trace
from nsa_lite.model import ATTENTIONS, DecoderLM, ModelConfig

TASKS = {"recall": Recall, "needle": Needle, "copy": Copy, "text": Text}

# What each task is trained with: sizes that a laptop finishes in minutes.
_TINY = NSAConfig.small(
    kv_heads=1, head_dim=32, value_dim=32, block_size=4, stride=2, num_selected=6
)
_RECALL = replace(_TINY, value_dim=14, phi="mean+mlp")
_TEXT = NSAConfig.small(
    dim=128,
    kv_heads=1,
    head_dim=32,
    value_dim=32,
    block_size=16,
    stride=8,
    select_block_size=32,
    num_selected=6,
    window=64,
)
PRESETS = {
    "recall": dict(nsa=_RECALL, layers=1, steps=1500, batch_size=32, lr=4e-3),
    "needle": dict(nsa=_TINY, layers=1, steps=600, batch_size=32, lr=4e-3),
    "copy": dict(nsa=_TINY, layers=2, steps=1200, batch_size=32, lr=2e-3),
    "text": dict(nsa=_TEXT, layers=2, steps=400, batch_size=4, lr=3e-3),
}
NEXT_STAGE_AT = 0.7  # accuracy, averaged over the last steps, at which the curriculum goes on
STAGE_SHARE = 0.25  # of the steps: no stage but the last lasts longer, learned or not
SOLVED_AT = 0.995  # held-out accuracy at which a run of the last stage stops


@dataclass(frozen=True)
class TrainConfig:
    """One run: everything that its result depends on but the machine."""

    task: str
    attention: str
    seed: int
    nsa: NSAConfig
    layers: int
    steps: int
    batch_size: int
    lr: float
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        require(self.task in TASKS, "task", repr(self.task), f"must be one of {list(TASKS)}")
        require(
            self.attention in ATTENTIONS,
            "attention",
            repr(self.attention),
            f"must be one of {list(ATTENTIONS)}",
        )
        require_int("seed", self.seed, at_least=0)
        for name in ("layers", "steps", "batch_size", "threads"):
            require_int(name, getattr(self, name), at_least=1)
        require(self.lr > 0, "lr", self.lr, "must be positive")

    @classmethod
    def preset(cls, task: str, attention: str, seed: int = 0, **changes) -> "TrainConfig":
        """The task's own sizes, with `changes` over them."""
        require(task in TASKS, "task", repr(task), f"must be one of {list(TASKS)}")
        return cls(task=task, attention=attention, seed=seed, **{**PRESETS[task], **changes})

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.attention}-seed{self.seed}"


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside the tensors."""

    step: int = 0
    stage: int = 0
    recent_accuracy: float = 0.0
    solved: bool = False
    seconds: float = 0.0  # spent in all, before and after a resume


def build(config: TrainConfig) -> DecoderLM:
    """The model of a run, its weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    task = TASKS[config.task]()
    model = DecoderLM(ModelConfig(task.vocab_size, config.layers, config.attention, config.nsa))
    return model.to(config.device)


def learning_rate(config: TrainConfig, step: int) -> float:
    """50 steps of warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / 50)
    return config.lr * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * step / config.steps)))


def steps(config: TrainConfig, directory: Path, resume: bool = False) -> Iterator[dict]:
    """Train, yielding one log record a step; leave log.jsonl and checkpoint.safetensors behind.

    A checkpoint is written every 50 steps, at the end, and when the caller closes the iterator
    between two steps; never in the middle of one. With resume=True the run goes on from it and
    ends with the same weights as an unbroken one.
    Errors: CheckpointError when there is a run already, or when its checkpoint does not fit.
    """
    torch.set_num_threads(config.threads)
    task, model = TASKS[config.task](), build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    checkpoint = directory / "checkpoint.safetensors"
    progress = _begin(config, model, optimizer, checkpoint, resume)
    log = directory / "log.jsonl"
    _cut_log(log, progress.step)

    def keep() -> None:
        save(checkpoint, model, optimizer, {"config": asdict(config), **asdict(progress)})

    with open(log, "a") as file:
        while progress.step < config.steps and not progress.solved:
            began = time.monotonic()
            record = _step(config, task, model, optimizer, progress)
            progress.seconds += time.monotonic() - began
            file.write(json.dumps(record) + "\n")
            file.flush()
            if "test_loss" in record:
                keep()
            try:
                yield record
            except GeneratorExit:
                keep()
                raise


def _begin(config, model, optimizer, checkpoint: Path, resume: bool) -> Progress:
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        return Progress()
    if not resume:
        raise CheckpointError(
            f"{checkpoint}: this run exists; continue it with --resume, or choose another --out"
        )
    state = restore(checkpoint, model, optimizer, asdict(config))
    return Progress(**{field: state[field] for field in asdict(Progress())})


def _cut_log(log: Path, step: int) -> None:
    """Drop the records after the checkpoint: the resumed run will write them again."""
    if not log.exists():
        return
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _step(config: TrainConfig, task, model, optimizer, progress: Progress) -> dict:
    """One update, in place; the record says what happened."""
    last_stage = len(task.stages) - 1
    batch = task.batch(config.batch_size, _seed(config, progress.step), progress.stage)
    batch = batch.to(config.device)
    last = asked_span(batch)
    loss, accuracy = loss_and_accuracy(model(batch.tokens, last=last), batch.targets[:, -last:])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, progress.step)
    optimizer.zero_grad()
    (loss + model.auxiliary_loss()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    progress.step += 1
    progress.recent_accuracy = 0.8 * progress.recent_accuracy + 0.2 * accuracy
    record = {
        "step": progress.step,
        "stage": progress.stage,
        "loss": round(loss.item(), 5),
        "accuracy": round(accuracy, 4),
    }
    overdue = progress.step >= STAGE_SHARE * config.steps * (progress.stage + 1)
    if progress.stage < last_stage and (progress.recent_accuracy > NEXT_STAGE_AT or overdue):
        progress.stage, progress.recent_accuracy = progress.stage + 1, 0.0
    if progress.step % 50 == 0 or progress.step == config.steps:
        record |= evaluate(model, task)
        solved = config.task != "text" and record["test_accuracy"] >= SOLVED_AT
        record["solved"] = progress.solved = solved and progress.stage == last_stage
    return record


def asked_span(batch: Batch) -> int:
    """How many newest positions hold every target: no other logits are worth computing."""
    asked = (batch.targets != IGNORE).any(0)
    return len(asked) - int(asked.int().argmax())


def _seed(config: TrainConfig, step: int) -> int:
    """A different batch at every step of every seed; evaluation uses seeds below 1000."""
    return 1000 + 1_000_003 * config.seed + step


def loss_and_accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy in nats and the share of right answers, over the positions that are asked."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    asked = targets != IGNORE
    return loss, float((logits.argmax(-1) == targets)[asked].float().mean())


@torch.no_grad()
def evaluate(model: DecoderLM, task, size: int = 0, seed: int = 0) -> dict:
    """Held-out loss, accuracy, and the hit rate or bits per byte, on the task's last stage."""
    size = size or (8 if task.name == "text" else 64)
    split = {"split": "validation"} if task.name == "text" else {}
    batch = task.batch(size, seed, **split).to(model.embedding.weight.device)
    model.eval()  # a rule that explores while it trains does not do so here
    with torch.random.fork_rng(devices=[]):  # random routing must not disturb the training
        torch.manual_seed(seed)
        logits, traces = model(batch.tokens, return_traces=True)
    model.train()
    loss, accuracy = loss_and_accuracy(logits, batch.targets)
    result = {"test_loss": round(float(loss), 5), "test_accuracy": round(accuracy, 4)}
    if task.name == "text":
        return result | {"bits_per_byte": round(float(loss) / math.log(2), 4)}
    return result | ({"hit_rate": round(hit_rate(traces, batch), 4)} if traces else {})


def hit_rate(traces: list[Trace], batch: Batch) -> float:
    """How often the block that holds the answer is selected, by any group of any layer."""
    block = batch.answer_at // traces[0].config.select_block_size  # (B, T)
    hit = torch.stack(
        [(t.ids == block[:, None, :, None]).any(-1).any(1) for t in traces]  # (B, T) each
    ).any(0)
    return float(hit[batch.answer_at >= 0].float().mean())


def read_log(directory: Path) -> list[dict]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def evaluations(records: list[dict]) -> list[dict]:
    """The records that hold a held-out result, without the numbers of their training batch."""
    return [
        {k: v for k, v in r.items() if k not in ("loss", "accuracy")}
        for r in records
        if "test_loss" in r
    ]


def last_evaluation(records: list[dict]) -> dict:
    """The newest record that holds a held-out result."""
    return next(r for r in reversed(records) if "test_loss" in r)


def table(runs: dict[str, list[dict]], seconds: dict[str, float]) -> str:
    """One line a run: how far it came, what it scores, how often it selects the answer."""
    lines = [
        f"{'run':26} {'steps':>5} {'loss':>7} {'accuracy':>9} {'hit rate':>9} "
        f"{'bits/byte':>9} {'seconds':>8}"
    ]
    for name, records in runs.items():
        r = last_evaluation(records)
        numbers = [
            f"{r[k]:9.3f}" if k in r else f"{'-':>9}"
            for k in ("test_accuracy", "hit_rate", "bits_per_byte")
        ]
        lines.append(
            f"{name:26} {r['step']:5} {r['test_loss']:7.3f} {' '.join(numbers)} "
            f"{seconds.get(name, 0.0):8.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    a = _parse(arguments)
    changes = {
        k: v
        for k in ("steps", "batch_size", "lr", "layers", "threads", "device")
        if (v := getattr(a, k)) is not None
    }
    runs: dict[str, list[dict]] = {}
    seconds: dict[str, float] = {}
    out = a.out or Path("runs") / a.task
    try:
        for attention in a.attention or ["nsa", "dense", "window"]:
            for seed in a.seed or [0]:
                config = TrainConfig.preset(a.task, attention, seed, **changes)
                _train_with_bar(config, out / config.name, a.resume)
                _, state = load(out / config.name / "checkpoint.safetensors")
                seconds[config.name] = state["seconds"]
                runs[config.name] = read_log(out / config.name)
    except KeyboardInterrupt:
        print(f"\nStopped and saved. To go on: {_command(arguments)} --resume", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _report(runs, seconds, out)
    _record(runs, seconds, changes, _command(arguments), out / "summary.json")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.train", description=__doc__.split("\n")[0]
    )
    p.add_argument("--task", choices=TASKS, default="recall")
    p.add_argument("--attention", choices=ATTENTIONS, action="append", help="repeat for several")
    p.add_argument("--seed", type=int, action="append", help="repeat for several; 0 if not given")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int)
    p.add_argument("--layers", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--threads", type=int, help="2 if not given; part of what a run repeats")
    p.add_argument("--device", help="cpu if not given; only there a resumed run repeats every bit")
    p.add_argument("--out", type=Path, help="runs/TASK if not given")
    p.add_argument("--resume", action="store_true", help="go on with runs that exist")
    return p.parse_args(arguments)


def _train_with_bar(config: TrainConfig, directory: Path, resume: bool) -> None:
    run, stop = steps(config, directory, resume), threading.Event()
    # Ctrl-C waits for the end of a step: half a step must not reach the checkpoint.
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with tqdm(total=config.steps, desc=config.name, unit="step") as bar:
            for record in run:
                bar.update(record["step"] - bar.n)
                shown = ("test_accuracy", "hit_rate", "bits_per_byte")
                if numbers := {k: record[k] for k in shown if k in record}:
                    bar.set_postfix(numbers)
                if stop.is_set():
                    run.close()
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _command(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python -m nsa_lite.lab.train", *(x for x in given if x != "--resume")])


def _record(runs, seconds, changes: dict, command: str, path: Path) -> None:
    """What was run, with what, and how it ended: enough to draw it again or to repeat it."""
    device = changes.get("device", "cpu")
    record = {
        "command": command,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "runs": {
            name: {
                "seconds": round(seconds[name], 1),
                "evaluations": evaluations(records),
            }
            for name, records in runs.items()
        },
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _report(runs: dict[str, list[dict]], seconds: dict[str, float], out: Path) -> None:
    from nsa_lite.show import plots  # matplotlib is slow to import and only the end needs it

    plots.use_style()
    figure = plots.draw_curves(runs)
    figure.savefig(out / "curves.png")
    text = table(runs, seconds)
    print(text)
    if "bits_per_byte" in last_evaluation(next(iter(runs.values()))):
        from nsa_lite.lab.text import bigram_bits_per_byte

        print(f"a bigram model: {bigram_bits_per_byte():.3f} bits per byte")
    print(f"curves: {out / 'curves.png'}")


if __name__ == "__main__":
    sys.exit(main())
