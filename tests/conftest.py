"""One CPU thread in each process of tests: the workers of pytest-xdist share the cores, and threads that wait spin."""

import torch

torch.set_num_threads(1)
