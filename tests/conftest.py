"""Puts its folder on the path, so that all tests can import `builders`; and pins threads, since tests run side by side."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
