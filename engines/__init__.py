"""Shelf of programs that run in the environments of engines; packaged as `auto_mmround.engines`."""
