"""Train the two models whose selection notebook 13 looks at, and keep weights along the way.

    python notebooks/recorded/train_for_selection.py recall runs/selection
    python notebooks/recorded/train_for_selection.py text runs/selection
"""

import shutil
import sys
from pathlib import Path

from nsa_lite import train

KEPT = {  # steps whose weights are kept; 0 is the untrained model
    "recall": (0, 50, 100, 150, 200, 300, 400, 600, 800, 1100, 1500),
    "text": (0, 50, 100, 200, 400, 700),
}
CHANGES = {"recall": {}, "text": {"batch_size": 2}}  # to the trainer's own settings


def main(task: str, folder: Path) -> None:
    config = train.TrainConfig.preset(task, "nsa", threads=1, steps=KEPT[task][-1],
                                       **CHANGES[task])
    directory = folder / task
    for record in train.steps(config, directory, resume=True):
        if "test_loss" in record:
            print(record, flush=True)
            if record["step"] in KEPT[task]:
                shutil.copy(directory / "checkpoint.safetensors",
                            directory / f"step{record['step']}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
