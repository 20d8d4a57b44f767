import torch

# The tests' models are tiny: one thread each is faster than two that wait for each other, also under `pytest -n 2`.
torch.set_num_threads(1)
