"""The commands as a user types them: one clear line and exit code 2 for every mistake, never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from tempact import __version__, cli
from tempact.cli import from_yaml
from tempact.errors import EXIT_STOPPED, EXIT_UNREAD, EXIT_USER_ERROR, UserError, guarded
from tempact.presets import PRESETS, get_preset

REPOSITORY = Path(__file__).parents[1]
TEMPACT = ("-c", "import sys; from tempact.cli import main; sys.exit(main())")  # what the console script runs


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "shapewrld"], "nearest: shapeworld"),
        (["train", "--planner.plan_per_prompt", "4"], "nearest: --planner.plans_per_prompt"),
        (["train", "--executor.frames", "25"], "accepted: a positive multiple"),
        (["train", "--executor.continuations", "1"], "accepted: at least 2"),
        (["train", "--planner.plans_per_prompt", "1"], "accepted: at least 2"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "shapeworld-smoke", "--output", "/proc/run"], "accepted: a writable folder"),
        (["generate", "--promt", "x"], "--prompt --prompts --again is required; accepted: python -m tempact.generate"),
        (["generate", "--prompt", "A cat sings."], "accepted"),
        (["evaluate", "--bogus", "runs/none"], "unrecognized arguments: --bogus"),
        (["evaluate", "nowhere"], "nowhere: holds no config.yaml"),
        (["report", "nowhere"], "nowhere"),
        (["trian"], "nearest: train"),
        ([], "accepted: train"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tempact", *arguments])
    assert cli.main() == EXIT_USER_ERROR
    shown = capfd.readouterr()
    assert shown.out == ""
    assert words in shown.err and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown.err


def test_the_console_script_passes_arguments_and_exit_code_on() -> None:
    done = command(*TEMPACT, "train", "--seed", "x")
    assert (done.returncode, done.stderr) == (2, "error: --seed: found 'x'; accepted: a whole number\n")


@pytest.mark.slow
def test_a_dry_run_prints_the_configuration_that_a_run_would_have(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command("-m", "tempact.train", "shapeworld-full", "--seed", "5", "--output", str(folder), "--dry-run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "run.yaml").write_text(done.stdout)
    config = from_yaml(tmp_path / "run.yaml")
    assert config.seed == 5 and config.trainer == get_preset("shapeworld-full").trainer
    assert config.output == str(folder) and not folder.exists()


def test_the_help_names_every_preset_and_option() -> None:
    done = command("-m", "tempact.train", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, make in PRESETS.items():
        assert name in done.stdout and str(make.__doc__).split(":")[0] in " ".join(done.stdout.split())
    for option in ("--resume", "--dry_run", "--config", "--seed", "--output", "--executor.optim.lr", "[PRESET]"):
        assert option in done.stdout
    assert "--preset" not in done.stdout
    full = command("-m", "tempact.train", "shapeworld-full", "-h").stdout
    assert "(default: runs/shapeworld-full)" in full  # the defaults shown are those of the preset


@pytest.mark.parametrize("start", [("-m", "tempact"), TEMPACT])
def test_the_script_and_the_module_list_their_commands(start: tuple[str, ...]) -> None:
    done = command(*start, "--help")
    assert done.returncode == 0 and all(f"\n  {verb}" in done.stdout for verb in cli.VERBS)
    shown = command(*start, "--version")
    told = re.findall(r"^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert (shown.returncode, shown.stdout) == (0, f"tempact {told[0]}\n")
    assert command(*start, "report", "nowhere").returncode == EXIT_USER_ERROR


@pytest.mark.parametrize("module", [*(f"tempact.{verb}" for verb in cli.VERBS), "tempact.shapeworld.pretrain"])
def test_every_command_tells_the_version(module: str) -> None:
    shown = command("-m", module, "--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"tempact {__version__}\n", "")


MODULES = [*(f"tempact.{verb}" for verb in cli.VERBS), "tempact", "tempact.evaluation.prompts",
           "tempact.shapeworld.pretrain", "tempact.models.wan.checkpoints"]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_a_reader_that_goes_away_is_no_fault(module: str) -> None:
    """`--help | head`: nothing on standard error, and a shell's exit code for it."""
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        arguments = [sys.executable, "-m", module, "--help"]
        shown = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=PIPE, stderr=PIPE, env=environment)
        shown.stdout.close()
        told = shown.stderr.read()
        assert b"Traceback" not in told and b"BrokenPipe" not in told, told
        assert shown.wait(60) in ((0, EXIT_UNREAD) if unbuffered else (EXIT_UNREAD,))


def test_a_pipe_that_breaks_elsewhere_is_a_fault() -> None:
    def broken() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        guarded(broken)


def test_only_a_users_mistake_is_made_short(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise UserError("a.csv row 3: found\n  nothing")

    def broken() -> int:
        raise ValueError("a bug")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert guarded(wrong) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: a.csv row 3: found nothing\n"
    assert guarded(lambda: 7) == 7 and guarded(interrupted) == EXIT_STOPPED == 130
    with pytest.raises(ValueError, match="a bug"):
        guarded(broken)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_module_with_help(verb: str) -> None:
    done = command("-m", f"tempact.{verb}", "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize(("verb", "options"), [("train", ["shapeworld-smoke", "--dry-run"]), ("doctor", [])])
def test_a_plain_install_is_enough_for_shapeworld(tmp_path: Path, verb: str, options: list[str]) -> None:
    """Without the packages of the extra "wan", and with one line where a backbone asks for them."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('diffusers', 'ftfy', 'openai'))\n"  # None: not to be found
        "from tempact.diagnostics import dry_run; dry_run.MOST_BRANCHES = 4\n"  # a plan of more takes its time
        f"from tempact import {verb}; sys.exit({verb}.main(sys.argv[1:]))"
    )
    done = command("-c", code, *options, "--output", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    if verb == "train":
        assert "# missing: nothing" in done.stdout
        refused = command("-c", code, "longlive", "--executor.weights", "random-tiny")
        assert refused.returncode == EXIT_USER_ERROR and refused.stderr.count("\n") == 1
        assert "random-tiny needs diffusers, ftfy; accepted: after pip install -e '.[wan]'" in refused.stderr
