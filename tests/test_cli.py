"""The command line: quick, torch-free where it must be, and plain about mistakes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.guard import DISTRIBUTION, ImportGuardError, _check_owners
from align.launch import asked_for_several, launcher_options, processes_of
from tests.conftest import QUICKSTART, ROOT


def paretune(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = "import sys; from align.cli import main; status = main(); print('torch' in sys.modules); sys.exit(status)"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=180)


def cpu_seconds(*arguments: str) -> float:
    """Processor time of the quickest of three runs: the machine may be busy with other things."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert paretune(*arguments).returncode == 0
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
    return min(seconds)


def test_help_answers_at_once():
    assert cpu_seconds("--help") < 1.5
    modules = "import sys; sys.argv[1:] = ['--help']; import align.cli\ntry: align.cli.main()\nexcept SystemExit: pass\n"
    result = subprocess.run(
        [sys.executable, "-c", modules + "print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.endswith("False\n")
    assert "check" in result.stdout


def test_check_is_quick_and_loads_no_torch():
    assert cpu_seconds("check", QUICKSTART) < 1.5
    result = paretune("check", QUICKSTART)
    assert result.stdout.endswith("False\n")
    for part in ("16 prompts x 8 samples = 128", "held out: 256 prompts", "clarity", "quickstart.yaml: ok"):
        assert part in result.stdout
    assert result.stdout.startswith("batch: ")


def test_check_prints_the_whole_configuration_when_asked_to():
    result = paretune("check", QUICKSTART, "--print")
    printed, _, rest = result.stdout.partition("\n\nbatch: ")
    assert yaml.safe_load(printed)["scoring"] == {"max_failed": 0.5, "pauses": 20, "pause": 30.0}
    assert "quickstart.yaml: ok" in rest


@pytest.mark.parametrize("arguments", [["check", QUICKSTART, "--print"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_stops_reading_gets_no_traceback(arguments, unbuffered):
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli", *arguments], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1 or (arguments, unbuffered) == (["--help"], "1")  # which argparse passes over


def test_check_says_what_self_training_does():
    found = paretune("check", "configs/selftrain.yaml", "--selftrain.weights=[entropy, shuffled]", cwd=ROOT).stdout
    wanted = "accuracy at least 1; weights entropy x shuffled; a term of 32 samples times 0.1; prompts by entropy"
    assert f"selftrain: of {wanted}\n" in found


def test_a_comparison_is_a_page(tmp_path: Path):
    result = paretune("report", "a", "b", "--output", "both", cwd=tmp_path)
    assert result.returncode == 2
    assert "--output both: name the page of a comparison, as in both.html" in result.stderr


def test_check_plans_for_several_processes():
    assert "64 per process" in paretune("check", QUICKSTART, "--processes", "2").stdout
    result = paretune("check", QUICKSTART, "--processes", "3")
    assert result.returncode == 2
    assert "cannot be split over 3 processes" in result.stderr


def test_check_tries_every_reward(tmp_path: Path):
    functions = {"fragile": "1 / 0", "shouting": "text.isupper()", "seven": "7"}
    source = "".join(f"def {name}(text): return {value}\n" for name, value in functions.items())
    (tmp_path / "my_rewards.py").write_text(source)
    good = paretune("check", QUICKSTART, "--objectives.accuracy.reward=my_rewards:shouting", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    bad = paretune("check", QUICKSTART, "--objectives.accuracy.reward=my_rewards:fragile", cwd=tmp_path)
    assert bad.returncode == 2
    assert "missing: ZeroDivisionError: division by zero (my_rewards.py:1)\n" in bad.stdout
    assert "objectives.accuracy: the reward gave no value for a sample text" in bad.stderr
    narrow = paretune("check", QUICKSTART, "--objectives.accuracy={reward: my_rewards:seven}", cwd=tmp_path)
    assert "objectives.accuracy: the reward gave no value" in narrow.stderr
    assert "widen objectives.accuracy.bounds, or set" in narrow.stderr
    tolerated = "--objectives.accuracy.missing=drop_sample"
    assert (
        paretune("check", QUICKSTART, "--objectives.accuracy.reward=my_rewards:fragile", tolerated, cwd=tmp_path).returncode
        == 0
    )


def test_check_shows_an_answer_of_the_data_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=?", "answer": "½?", "expression": "1+1"}\n')
    rows = "={type: file, path: " + str(tmp_path / "rows.jsonl") + "}"
    changes = (f"--prompts.train{rows}", f"--prompts.evaluation{rows}", "--objectives.accuracy.reward=math_answer")
    result = paretune("check", QUICKSTART, *changes)
    assert result.returncode == 2
    assert "missing: ValueError: the stated answer '½?' cannot be read by math-verify: mend the row" in result.stdout


def test_check_of_a_hub_model_downloads_nothing():
    result = paretune("check", QUICKSTART, "--policy.model=nobody/nothing")
    assert result.returncode == 0
    assert "training will download what is not here" in result.stdout
    unknown = paretune("check", QUICKSTART, "--policy.model=nobody/nothing", "--objectives.accuracy.reward=jugde")
    assert unknown.returncode == 2
    assert "no built-in reward 'jugde'" in unknown.stderr


def test_check_takes_chat_messages(tmp_path: Path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(ROOT / "align" / "policies" / "arithmetic", model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    row = {"prompt": [{"role": "user", "content": "7+5-3=?"}], "answer": 9, "expression": "7+5-3"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = "={type: file, path: " + str(tmp_path / "rows.jsonl") + "}"
    result = paretune(
        "check", QUICKSTART, f"--policy.model={model}", f"--prompts.train{source}", f"--prompts.evaluation{source}"
    )
    assert result.returncode == 0, result.stderr
    assert "the first: '[7+5-3=?]'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "absent.yaml"], "no configuration at 'absent.yaml'"),
        (["check", QUICKSTART, "--policy.model=./absent"], "'./absent' is not a folder with a config.json"),
        (["check", QUICKSTART, "--policy.model=builtin:poetry"], "no built-in policy 'poetry'"),
        (
            ["check", QUICKSTART, "--prompts.train.function=a.b:c"],
            "prompts.train: prompt function 'a.b:c' cannot be imported",
        ),
        (["check", QUICKSTART, "--prompts.train={type: file, path: absent.jsonl}"], "prompts.train: no file 'absent.jsonl'"),
        (["check", QUICKSTART, "--rollout.max_tokens=4000"], "the model's context holds"),
        (["check", QUICKSTART, "--objectives.accuracy.reward=jugde"], "objectives.accuracy: no built-in reward 'jugde'"),
        (["check", QUICKSTART, "--processes=16", "--prompts.evaluation.args.count=9"], "9 prompts cannot be shared by 16"),
        (["train"], "nothing to train: give --config FILE"),
        (["train", "--resume", "absent"], "--resume: absent is not a run folder"),
        (["report", "absent"], "absent"),
        (["eval", "absent"], "absent is not a run folder, so the objectives and prompts must come from --config"),
    ],
)
def test_mistakes_are_one_plain_sentence(arguments, message):
    result = paretune(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.endswith("False\n")  # torch was not even imported


def test_unknown_arguments_are_refused():
    result = paretune("report", "runs/x", "--fast")
    assert result.returncode == 2
    assert "unrecognized arguments: --fast" in result.stderr


def test_schema_is_json():
    assert json.loads(paretune("schema").stdout.removesuffix("False\n"))["title"] == "Config"


# --- imports ----------------------------------------------------------------------------------------------------------


def test_a_module_of_ours_that_is_shadowed_is_named(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("")
    code = "import sys; sys.path[:0] = ['', sys.argv.pop(1)]; from align.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "check", QUICKSTART], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert f"`import rewards` finds {tmp_path / 'rewards.py'} instead of {ROOT / 'rewards'}" in result.stderr
    assert "Rename it" in result.stderr


def test_a_package_of_ours_that_others_own_too_is_named(monkeypatch):
    owners = {"align": [DISTRIBUTION], "rewards": [DISTRIBUTION, "other-rewards"], "rollout": [DISTRIBUTION]}
    monkeypatch.setattr("align.guard.packages_distributions", lambda: owners)
    with pytest.raises(ImportGuardError, match="'rewards' is installed by other-rewards too"):
        _check_owners()


# --- several CPU processes ----------------------------------------------------------------------------------------------


def test_the_launchers_silence_about_cpu_processes_is_noticed():
    asked = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert asked_for_several(asked)
    assert not asked_for_several(asked | {"RANK": "0"})  # torch's launcher
    assert not asked_for_several(asked | {"PMI_RANK": "0"})  # MPI
    assert not asked_for_several({"ACCELERATE_USE_CPU": "True"})  # one process
    assert not asked_for_several(asked | {"ACCELERATE_USE_CPU": "False"})
    command = ["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "align.train", "--config", "x"]
    assert processes_of(command) == 2
    assert processes_of(["accelerate", "launch", "--num-processes=3", "-m", "align.train"]) == 3
    assert processes_of(["accelerate", "launch", "-m", "align.train"]) == 1


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python /x/accelerate launch --config_file 'a b.yaml' -m align.train --config x", " --config_file 'a b.yaml'"),
        ("python -m accelerate.commands.launch --cpu --num_processes 2 -m align.train", " --cpu --num_processes 2"),
        ("python '/a b/accelerate' launch -m align.train --resume x", ""),
        ("accelerate-launch --num_processes 2 -m align.train", " --num_processes 2"),
        ("python -m torch.distributed.run --nproc_per_node 2 -m align.train", None),
        ("accelerate launch -m align.trainer", None),
        ("python -m align.train --output=accelerate", None),
    ],
)
def test_what_the_launcher_was_told_is_known(command, options):
    assert launcher_options([["bash"], shlex.split(command), ["accelerate", "launch", "-m", "align.train"]]) == (
        "" if options is None else options
    )
    assert launcher_options([shlex.split(command)]) == options
