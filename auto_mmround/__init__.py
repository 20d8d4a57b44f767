"""Quantize multimodal large models to 2-8 bits, export to every engine, prove it right."""

__version__ = "0.1.0"
