#!/usr/bin/env python3
"""Accuracy by kind of question of the evidence model, and of checkpoints of it.

    bench/evidence.py --model OUT/model [--checkpoints DIR ...] [--limit 280] [--keep DIR]

An answer is right where greedy decoding gives it word for word. The questions are those of
OUT/heldout, which scripts/join_evidence_model.py wrote; --limit takes the first.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import kept


def by_kind(folder: Path, held: Path, limit: int | None) -> dict[str, float]:
    """Share of right answers of each kind, and of all."""
    from auto_mmround.checkpoint.loader import load_any
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.metrics import measure

    loaded, rows = load_any(str(folder)), json.loads((held / "vqa.json").read_text())[:limit]
    asked = defaultdict(list)
    for row in rows:
        asked[row["kind"]].append(row)
    shares = {}
    with tempfile.TemporaryDirectory() as drawer:
        for kind, some in asked.items():
            file = Path(drawer, "vqa.json")
            file.write_text(json.dumps(some))
            inputs = held_out(
                loaded, str(file), extra_data_dir=str(held / "images"), limit=len(some)
            )
            shares[kind] = measure([loaded.model], inputs)[0].accuracy or 0.0
    right = sum(shares[kind] * len(some) for kind, some in asked.items())
    return shares | {"all": right / len(rows)}


def main() -> None:
    """A row a folder."""
    parser = kept.options(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int)
    found = parser.parse_args()
    held, table = found.model.parent / "heldout", None
    for folder in (found.model, *found.checkpoints):
        shares = by_kind(folder, held, found.limit)
        table = table or kept.Table("folder", *shares)
        table.add(folder.name, *(f"{share:.1%}" for share in shares.values()))
    kept.keep(found.keep, "evidence", "Evidence model, accuracy by kind", table)


if __name__ == "__main__":
    main()
