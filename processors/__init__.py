"""Shelf of input processors: one file a family whose inputs need code; packaged as
`auto_mmround.processors`."""
