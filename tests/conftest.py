"""What every process of tests shares.

One CPU thread: the workers of pytest-xdist share the cores, and threads that wait spin. No deadline for an example of
hypothesis: on a busy machine any of them may be slow.
"""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
