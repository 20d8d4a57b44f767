"""Shelf of chat templates: one JSON file a model family; packaged as `auto_mmround.templates`."""
