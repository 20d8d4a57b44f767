"""What the package knows, as tables: export formats and model families."""

from collections import Counter
from textwrap import shorten

from rich.table import Table

from auto_mmround.calibration.template import shipped
from auto_mmround.export.formats import FORMATS
from auto_mmround.families import FAMILIES, PLAIN, swept
from auto_mmround.printing import console, show
from auto_mmround.readers import ENGINES
from auto_mmround.verify.limits import LIMITS, support


def show_formats() -> int:
    """The export formats: their schemes, the engines that read them, and what those refuse."""
    table, matrix = Table("format", "bits", "what it is"), Table("format", *ENGINES)
    for fmt in FORMATS.values():
        table.add_row(fmt.name, ", ".join(map(str, fmt.bits)), fmt.summary)
        matrix.add_row(fmt.name, *support(fmt.name).values())
    show(table)
    console.print("Which engines read them (vLLM: on processors):")
    show(matrix)
    for i, limit in enumerate(LIMITS, 1):
        console.print(f"({i}) {limit.engine} refuses {limit.what}: {limit.message}")
    return 0


def show_families() -> int:
    """The table of families: calibration data, stages, and the writer of conversations."""
    templates = shipped()
    table = Table("model_type", "family", "calibrates with", "stages", "template", "note")
    types = {row.architecture: row.model_type for row in swept()}
    plain = {types[architecture]: family for architecture, family in PLAIN.items()}
    for model_type, family in [*FAMILIES.items(), *plain.items()]:
        name = family.template or model_type
        stages = ", ".join(dict.fromkeys(family.stages))
        writer = name if name in templates else "the model's own" if len(family.stages) > 1 else "-"
        table.add_row(
            model_type, family.title, ", ".join(family.calibrates), stages, writer, family.note
        )
    show(table)
    console.print(
        f"{len(FAMILIES)} families, each tested on a tiny random model with --quant_nontext_module:"
        " plan, calibrate, tune, export to auto_round and auto_gptq, read back, equal logits."
        f" The last {len(PLAIN)} have no quirk, and are tested by class, as below."
        " Others work by structure if the replay of their blocks proves right; else they are"
        " refused with one line. See docs/new-model.md."
    )
    _show_swept()
    return 0


def _show_swept() -> None:
    """What became of every class of Transformers, and how many of each verdict."""
    rows = swept()
    table = Table("class", "verdict", "went", "stages", "why not", title="Every class, tiny")
    for row in rows:
        stages = ", ".join(dict.fromkeys(row.stages))
        table.add_row(
            row.architecture,
            row.verdict,
            ", ".join(row.ways),
            stages,
            shorten(row.line, 160, placeholder=" .."),
        )
    show(table)
    for group in dict.fromkeys(row.group for row in rows):
        counts = Counter(row.verdict for row in rows if row.group == group).most_common()
        told = ", ".join(f"{count} {word}" for word, count in counts)
        console.print(f"{group}: {told}")
