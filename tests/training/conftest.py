"""Settings of the tests that compute with torch."""

import torch

# The models here are tiny: with more threads these tests wait for one another's barriers, minutes on a busy machine.
torch.set_num_threads(1)
