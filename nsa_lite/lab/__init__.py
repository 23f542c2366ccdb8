"""What is done with the paper's layer: tasks, text, the trainer, checkpoints, recorded runs."""
