"""What benches share, bench/kept.py and bench/meter.py."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from benches import FOLDER, bench


@pytest.fixture(scope="module")
def kept():
    return bench("kept")


def test_a_part_has_the_peaks_of_what_came_before_a_part_inside():
    now = [0.0]
    meter = bench("meter").Meter(lambda: now.__setitem__(0, 0.0), lambda: now[0])
    with meter.part("all"):
        now[0] = 5.0
        with meter.part("inside"):
            now[0] = 2.0
        with meter.part("other"):
            now[0] = 3.0
    assert meter.peaks == {"all": 5.0, "inside": 2.0, "other": 3.0}
    assert meter.seconds.keys() == meter.peaks.keys()


def test_a_page_has_the_table_the_machine_and_the_command(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/x.py", "--rows", "3"])
    table = kept.Table("weights", "KL")
    table.add("W4", "0.1")
    assert capsys.readouterr().out == f"{table}\n" == "| weights | KL |\n|---|---|\n| W4 | 0.1 |\n"
    kept.keep(None, "x", "Title", table)
    kept.keep(tmp_path / "new", "x", "Title", "About it.", table)
    (page,) = (tmp_path / "new").iterdir()
    day = page.stem.removeprefix("x-")
    title, about, kept_table, machine, command = page.read_text().rstrip("\n").split("\n\n")
    assert (title, about, kept_table) == (f"# Title, {day}", "About it.", str(table))
    assert json.loads(machine)["packages"]["torch"]
    assert command == "Command: `bench/x.py --rows 3`"


def test_sections_are_added_to_the_page_of_the_day(kept, tmp_path):
    for name in ("one", "two"):
        kept.keep(tmp_path, "x", "Title", f"about {name}", section=name)
    (page,) = tmp_path.iterdir()
    text = page.read_text()
    assert [line[2:] for line in text.splitlines() if line.startswith("#")][1:] == [" one", " two"]
    assert text.count("# Title") == 1 and "about one" in text and "about two" in text


def test_schemes_by_name(kept):
    assert kept.scheme("W3g-1a") == {"bits": 3, "group_size": -1, "sym": False}
    with pytest.raises(SystemExit, match="scheme W4: W4g128"):
        kept.scheme("W4")


def test_an_answer_is_the_last_line_or_what_went_wrong(kept, tmp_path):
    program = tmp_path / "x.py"
    program.write_text("import sys\nprint('words')\nprint(sys.argv[2])\n")
    assert kept.answer(str(program), {"a": 1}) == {"a": 1}
    program.write_text("raise ValueError('wrong')\n")
    assert kept.answer(str(program), {}) == {"error": "ValueError: wrong"}


def test_a_result_is_made_once(kept, tmp_path):
    program, job = tmp_path / "x.py", {"result": str(tmp_path / "found.json")}
    program.write_text(
        "import json, sys\nwith open(json.loads(sys.argv[2])['result'], 'x') as file:\n"
        "    file.write('[1]')\n"
    )
    assert kept.result(str(program), job) == kept.result(str(program), job) == [1]


@pytest.mark.parametrize("name", ["accelerator", "shapes"])
def test_the_parts_that_a_bench_watches_are_there(name):
    for owner, attribute in bench(name).PARTS.values():
        assert callable(getattr(owner, attribute)), attribute


def test_the_parts_that_are_counted_are_there():
    with bench("operations").counting() as counted:
        pass
    assert not any(counter.total() for counter in counted.by_part.values())


def test_results_of_other_options_are_not_taken_for_those_that_were_asked_for(kept, tmp_path):
    def asked(**options):
        return Namespace(work=tmp_path / "w", keep=None, worker=None, **options)

    for more in ({}, {"text": Path("b.txt")}, {"methods": ["rtn"]}):
        options = {"samples": 32, "text": None, "methods": ["auto"]} | more
        assert kept.work_folder(asked(**options), "methods") == tmp_path / "w"
    with pytest.raises(SystemExit, match=r"another samples \(32, now 128\): give --work another"):
        kept.work_folder(asked(samples=128, text=None, methods=["rtn"]), "methods")


def test_a_test_may_load_a_bench_without_any_before_it(monkeypatch):
    """One that imports its neighbours, as the slow test of memory needs it."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(FOLDER)])
    monkeypatch.delitem(sys.modules, "kept", raising=False)
    assert callable(bench("scale").make) and str(FOLDER) not in sys.path
