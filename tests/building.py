"""`samples.build` with the fields of its two records as keyword arguments, for short tests."""

from dataclasses import fields
from typing import Any

from auto_mmround.calibration import samples
from auto_mmround.calibration.settings import Asked, Reads, Settings, choose
from auto_mmround.calibration.template import Template


def _part(record: type, options: dict[str, Any]) -> Any:
    return record(
        **{each.name: options.pop(each.name) for each in fields(record) if each.name in options}
    )


def build(dataset: Any, **options: Any) -> Any:
    preparers, reading = _part(samples.Preparers, options), _part(samples.Reading, options)
    assert not options, options
    return samples.build(dataset, preparers, reading)


def chosen(dataset: Any, template: Template, **options: Any) -> tuple[Settings, tuple[str, ...]]:
    model, asked = _part(Reads, options), _part(Asked, options)
    return choose(dataset, template, model, asked, **options)
