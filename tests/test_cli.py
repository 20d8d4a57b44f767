"""The command line as people type it, right and wrong; and the wheel in an environment of its
own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_models import FAMILIES, TEXT, tiny_texts, tiny_tokenizer

from auto_mmround import cli, flags
from auto_mmround.model.loading import DEMO
from auto_mmround.recipe.recipe import KEYS

ROOT = Path(__file__).parents[1]
SHORT = ["--iters", "1", "--nsamples", "8", "--seqlen", "64", "--device", "cpu"]
FAST = ["--model", "demo", "--dataset", "demo", *SHORT]


def test_the_original_command_with_other_names(tmp_path, capsys):
    out = tmp_path / "tmp_autoround"
    command = (
        f"--model demo --bits 4 --group_size 128 --format auto_round --output_dir {out} --dataset"
        " demo-text"
    )
    assert cli.main([*command.split(), *SHORT]) == 0
    assert (out / "demo-w4g128-auto_round" / "config.json").is_file()
    printed = capsys.readouterr()
    assert "done in" in printed.out and "loss" in printed.err and "Traceback" not in printed.err


def test_a_family_without_a_template_is_said_once(tmp_path, capfd):
    FAMILIES["llama"].save(tmp_path / "model", tiny_tokenizer())
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts(8, 40)))
    words = f"--model {tmp_path}/model --dataset {tmp_path}/a.txt --group_size 32 --iters 1"
    words += f" --nsamples 8 --seqlen 16 --device cpu --output_dir {tmp_path}/out"
    assert cli.main(words.split()) == 0
    assert capfd.readouterr().err.count("no template for model type 'llama'") == 1


def test_a_recipe_file_and_flags_over_it(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'model = "demo"\nalgorithm = "rtn"\nbits = 3\n[result]\nformat = "auto_gptq"\n'
    )
    assert cli.main([str(recipe), "--output-dir", str(tmp_path / "o"), "--bits=2", "--asym"]) == 0
    stored = (tmp_path / "o" / "demo-w2g128-auto_gptq" / "recipe.toml").read_text()
    assert "bits = 2" in stored and "sym = false" in stored and 'algorithm = "rtn"' in stored


def test_eval_prints_json(tmp_path, capsys):
    assert (
        cli.main(["--model", "demo", "--iters", "0", "--bits", "3", "--output_dir", str(tmp_path)])
        == 0
    )
    capsys.readouterr()
    folder = str(tmp_path / "demo-w3g128-auto_round")
    assert (
        cli.main(["eval", "--model", folder, "--reference", "demo", "--limit", "2", "--json"]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"]["text"] > 0 and figures["kl"]["image"] > 0 and figures["answers"] == 2
    assert 0 <= figures["accuracy"] <= 1 and figures["perplexity"] > 1


@pytest.mark.parametrize(
    "command", [["plan", "--model", "demo"], ["formats"], ["families"], ["eval", "--help"], ["-h"]]
)
def test_commands_that_only_tell(command, capsys):
    try:
        assert cli.main(command) == 0
    except SystemExit as stop:  # argparse leaves this way after -h
        assert stop.code == 0
    assert len(capsys.readouterr().out) > 100


def damaged_image_set(folder: Path) -> str:
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    (folder / "set.json").write_text(
        json.dumps([{"id": "one", "image": "bad.png", "conversations": turns}] * 9)
    )
    return str(folder / "set.json")


def empty_set(folder: Path) -> str:
    (folder / "empty.jsonl").write_text("")
    return str(folder / "empty.jsonl")


def no_weights(folder: Path) -> str:
    shutil.copytree(DEMO, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder / "model")


def other_weights(folder: Path) -> str:
    import torch

    shutil.copytree(DEMO, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(
        {"x": torch.zeros(1)}, folder / "model" / "model.safetensors", metadata={"format": "pt"}
    )
    return str(folder / "model")


def other_vocabulary(folder: Path) -> str:
    tiny = replace(FAMILIES["llama"], config=TEXT | {"vocab_size": 2500})
    tiny.save(folder / "model", tiny_tokenizer())
    return str(folder / "model")


@pytest.mark.parametrize(
    "wrong, word",
    [
        (["--bit", "4"], "did you mean --bits"),
        (["--group-sise=64"], "did you mean --group_size"),
        (["--bits", "four"], "invalid int value"),
        (["--bits", "1"], "2 to 8"),
        (["\u2014bits", "4"], "long dash"),
        (["--format", "auto_gtpq"], "did you mean auto_gptq"),
        (["--group_size", "100"], "group size 100"),
        (["--template", "no_such"], "no_such"),
        (["--template", "no.json"], "no.json"),
        (["--processor", "no_such"], "no_such"),
        (["--dataset", "no_such.json"], "no_such.json"),
        (["--dataset", "demo:nmu=3"], "num"),
        (["--dataset", damaged_image_set], "bad.png"),
        (["--dataset", empty_set], "empty.jsonl"),
        (["--model", "./no_such"], "no_such"),
        (["--model", no_weights], "safetensors"),
        (["--model", other_weights], "missing"),
        (["--extra_data_dir", "/no/such"], "/no/such"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--adam"], "refused"),
        (["--eval"], "eval --model DIR --lmms TASKS"),
        (["evla"], "did you mean eval"),
        (["no.toml"], "no.toml"),
        (["eval", "--model", "demo", "--dataset", "no.json"], "no.json"),
        (["eval"], "--model"),
        (["eval", "--model", ""], "an argument is empty"),
        (["eval", "--model", "demo", "--reference", "", "--limit", "1"], "an argument is empty"),
        (
            ["eval", "--model", "demo", "--reference", other_vocabulary],
            "is another model: it gives",
        ),
        (["--seed", "-1"], "seed = -1: from 0"),
        (["--lr", "-1"], "lr = -1.0: 0"),
        (["--minmax_lr=-1"], "minmax_lr = -1.0: 0"),
        (["--block_size", "9" * 20], "below 2^63"),
        (["report", "a", "--output", ""], "output is empty"),
    ],
)
def test_every_mistake_is_one_line_exit_2_and_leaves_nothing(wrong, word, tmp_path, capfd):
    words = [part(tmp_path) if callable(part) else part for part in wrong]
    out = tmp_path / "out"
    command = (
        words
        if words[0] in ("eval", "evla", "no.toml", "report")
        else [*FAST, "--output_dir", str(out), *words]
    )
    assert cli.main(command) == 2
    error = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("auto-round-mllm:")
    ]
    assert len(error) == 1 and word in error[0] and not out.exists()


def test_mistakes_print_nothing_but_their_line():
    done = subprocess.run(
        [sys.executable, "-m", "auto_mmround", "--model", "demo", "--bits", "77"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_the_wheel_carries_shelves_and_demo(tmp_path):
    """Built from a clean copy of what git would pack, unpacked beside nothing of the checkout, and
    run."""
    copy = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = (
        listed.stdout.split("\n") if listed.returncode == 0 else [str(p) for p in ROOT.rglob("*")]
    )
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "auto_mmround" / "templates" / "qwen2_vl.json").is_file()
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from auto_mmround import cli; "
    check = (
        "import auto_mmround; assert auto_mmround.__file__.startswith(sys.path[0]);"
        " sys.exit(cli.main())"
    )
    out = tmp_path / "out"
    # -I keeps the checkout and its editable install's finder from being found first.
    done = subprocess.run(
        [sys.executable, "-I", "-c", run + check, str(site), *FAST, "--output_dir", str(out)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "demo-w4g128-auto_round" / "model.safetensors").is_file()


def test_the_installed_command_runs():
    for name in ("auto-round-mllm", "auto_round_mllm"):
        command = Path(sys.executable).with_name(name)
        done = subprocess.run([command, "--version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("auto_mmround ")


@pytest.mark.parametrize("flag", ["--ignore", "--targets", "--fp_layers"])
@pytest.mark.parametrize("pattern, near", [("q_prj", "q_proj"), ("re:.*q_prj$", "q_proj")])
def test_patterns_that_match_nothing_name_the_nearest(flag, pattern, near, capsys):
    assert cli.main(["plan", "--model", "demo", "--device", "cpu", flag, pattern]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"layer pattern '{pattern}' matches no linear layer; nearest:" in line and near in line


def told(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_first_help_screen_is_short_and_the_other_has_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, every = told(capsys, "-h"), told(capsys, "--help-all")
    assert len(short.splitlines()) <= 64 and max(map(len, short.splitlines())) <= 90
    named = set(re.findall(r"^  --(\w+)", short, re.MULTILINE))
    assert named == {*flags.USUAL, "help_all", "version", "json_log"}
    assert len(re.findall(r"^  auto-round-mllm ", short, re.MULTILINE)) == 3
    assert all(re.search(rf"^  {name} ", short, re.MULTILINE) for name in [*flags.COMMANDS][1:])
    for name, key in KEYS.items():
        own = re.findall(rf"^  --{name}(?: |$)", every, re.MULTILINE)
        assert len(own) == bool(key.text), name
        assert all(f"--{other}" in every for other in (*key.names, *(key.off or ())[:1])), name
        assert f"\n{key.section}:\n" in every
    assert told(capsys, "plan", "-h").count("--") < 30


def test_every_command_has_flags_help_and_a_way_to_run(capsys):
    assert cli.RUN.keys() == flags.COMMANDS.keys()
    for name in flags.COMMANDS:
        assert flags.COMMANDS[name].text.rstrip(".") in " ".join(told(capsys, name, "-h").split())


def completed(line: str) -> set[str]:
    """What a shell offers for the line, asked as bash asks."""
    answer = "import os, sys; sys.path.insert(0, '.'); from auto_mmround.cli import main; main()"
    asking = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asking |= {
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }
    done = subprocess.run(
        [sys.executable, "-c", answer], cwd=ROOT, env=os.environ | asking,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {word.strip() for word in done.stdout.split("\n") if word.strip()}


def test_a_shell_completes_commands_flags_and_values(capsys):
    pytest.importorskip("argcomplete", reason="pip install argcomplete")
    assert {"eval", "verify", "plan"} <= completed("auto-round-mllm ")
    assert completed("auto-round-mllm --group") == {"--group_size"}
    assert completed("auto-round-mllm plan --act_s") == {"--act_static"}
    assert completed("auto-round-mllm verify . --eng") == {"--engine"}
    assert {"auto", "gptq", "rtn"} <= completed("auto-round-mllm --algorithm ")
    for shell, word in (("bash", "complete "), ("zsh", "compdef"), ("fish", "complete --command")):
        assert cli.main(["completion", shell]) == 0
        code = capsys.readouterr().out
        assert word in code and "auto-round-mllm" in code and "auto_round_mllm" in code


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)  # as if it were not installed
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install argcomplete" in capsys.readouterr().err


@pytest.mark.parametrize(
    "closed, status, said",
    [(">&-", 0, ""), (">&- 2>&- <&-", 0, ""), ("> /dev/full", 1, "what is printed can't be")],
)
def test_an_output_that_is_closed_or_full(closed, status, said):
    """Services start programs without any; a traceback before."""
    command = f"{sys.executable} -m auto_mmround formats {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == status
    assert said in done.stderr and len(done.stderr.splitlines()) == bool(said)


READ_BY_NOBODY = {
    "formats": 0,
    "-h": 0,
    "completion bash": 0,
    "plan --model demo --iters 0 --json": 0,
    "--model demo --iters 0 --device cpu --output_dir {out}": 0,
    "verify {out}/nowhere": 2,
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", READ_BY_NOBODY)
def test_a_reader_that_leaves_ends_no_command(command, unbuffered, tmp_path):
    """As `head` does. Both outputs lead to it; the results are files, and the status tells."""
    code = "import sys; from auto_mmround import cli; sys.exit(cli.main())"
    reads, writes = os.pipe()
    os.close(reads)
    words = command.format(out=tmp_path).split()
    with (tmp_path / "told").open("w") as told:
        err = told if command == "formats" else writes
        done = subprocess.run(
            [sys.executable, "-c", code, *words], stdout=writes, stderr=err,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    os.close(writes)
    assert done.returncode == READ_BY_NOBODY[command]
    assert (tmp_path / "told").read_text() == ""
    assert bool(list(tmp_path.glob("*/config.json"))) == ("{out}" in command and "iters" in command)


def test_python_without_docstrings_is_one_line():
    """Transformers' classes can't be defined in it."""
    code = "import sys; from auto_mmround import cli; sys.exit(cli.main())"
    words = [sys.executable, "-OO", "-c", code, "plan", "--model", "demo"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "PYTHONOPTIMIZE" in done.stderr


def test_words_with_colons_are_no_pictures():
    from auto_mmround.printing import console

    with console.capture() as printed:
        console.print("/data/:cat:/model")
    assert printed.get() == "/data/:cat:/model\n"


@pytest.mark.parametrize(
    "named, said, status",
    [("eval.json", "eval.json can't be written", 2), (None, "can't be written, or a file", 1)],
)
def test_a_full_disk_is_one_line(named, said, status):
    """An error of `write` has no name."""
    code = (
        "import errno, sys; from auto_mmround import cli\n"
        f"def full(_): raise OSError(errno.ENOSPC, 'No space left on device', {named!r})\n"
        "cli.RUN['formats'] = full; sys.exit(cli.main(['formats']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert said in line and line.endswith(": No space left on device")


def asking_an_engine(tmp_path, before=""):
    """A program that waits for an engine in a folder of its own for temporary files."""
    code = (
        "import sys, tempfile; from pathlib import Path; from auto_mmround import cli\n"
        "from auto_mmround.verify import engines\n"
        "engine = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "def ask(_):\n"
        "    with tempfile.TemporaryDirectory() as folder:\n"
        "        command = [sys.executable, '-c', engine]\n"
        "        engines._run(command, Path(folder) / 'log', 60, print)\n"
        # what an engine says beside its answer is kept
        "engines.piece_of = lambda line: (print(line, flush=True), None)[1]\n"
        "cli.RUN['ask'] = ask; sys.exit(cli.main(['ask']))"
    )
    if not before:  # a test that runs behind a terminal inherits signals that are ignored
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "for each in (signal.SIGTERM, signal.SIGHUP): signal.signal(each, signal.SIG_DFL)\n"
        ) + code
    (tmp_path / "files").mkdir()
    return subprocess.Popen(
        [*before.split(), sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path / "files")},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_the_program_is_the_end_of_its_engines(number, tmp_path):
    """And its temporary files go. SIGTERM is what schedulers send."""
    with asking_an_engine(tmp_path) as program:
        engine = int(program.stdout.readline())
        assert list((tmp_path / "files").iterdir())
        program.send_signal(number)
        (line,) = program.communicate(timeout=60)[1].splitlines()
        assert program.returncode == 128 + number
    assert line.endswith("interrupted" if number == signal.SIGINT else f"by {number.name}")
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
    assert list((tmp_path / "files").iterdir()) == []


def test_a_program_that_is_to_outlive_its_terminal_does(tmp_path):
    with asking_an_engine(tmp_path, "nohup") as program:
        engine = int(program.stdout.readline())
        program.send_signal(signal.SIGHUP)
        program.send_signal(signal.SIGCONT)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(timeout=1)
        os.kill(engine, signal.SIGKILL)
        program.communicate(timeout=60)
