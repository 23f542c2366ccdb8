"""Settings that have to come before anything imports triton or an exercise."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run interpreted
os.environ["NSA_LITE_PROGRESS"] = "off"  # the learner's own file is no test's business
