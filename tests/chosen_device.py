"""The accelerator that tests run on: the stand-in, or what `pytest --accelerator cuda` names."""

NAME = "accel"
