"""The files of configs/accelerate: accelerate reads them, and what they shard trains like what they do not."""

import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from tests import forks
from tests.conftest import ROOT, environment, overrides, read_lines

FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CPU = ("--num_processes", "2", "--mixed_precision", "no")  # what makes a file for eight GPUs one for a CPU
POLICY = ROOT / "align" / "policies" / "arithmetic" / "model.safetensors"
FEW = ("--steps=3", "--evaluation.every=0", "--checkpoint.every=3")
COMPARED = ("loss", "grad_norm", "entropy", "objectives/accuracy/mean", "objectives/brevity/mean", "completions/mean_length")
TOLERANCE = 1e-5  # 2e-7 was seen


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_one_that_accelerate_launches(path):
    file = load_config_from_file(str(path))
    command = f"accelerate launch --config_file configs/accelerate/{path.name} -m align.train --config "
    assert command in path.read_text(encoding="utf-8")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    assert args.num_processes == (2 if path.stem.endswith("_cpu") else 8)
    kind = file.distributed_type.value
    assert kind == ("DEEPSPEED" if "zero" in path.stem else "FSDP" if "fsdp" in path.stem else "MULTI_GPU")
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == tuple(
        kind == k for k in ("DEEPSPEED", "FSDP", "MULTI_GPU")
    )
    if kind == "DEEPSPEED":
        assert args.zero_stage == (2 if "zero2" in path.stem else 3)
        assert (args.offload_optimizer_device, args.offload_param_device) == (
            ("cpu", "cpu") if "offload" in path.stem else (None, None)
        )
    if kind == "FSDP":
        assert args.fsdp_version == 2


def train(name: str, folder: Path, module: str = "align.train") -> list[dict]:
    """Lines of metrics of a short run in two processes on a CPU."""
    env = environment(2)
    del env["ACCELERATE_USE_CPU"]  # it leaves no room for DeepSpeed
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml", *CPU]
    command = [*launcher, "-m", module, *overrides(folder, *FEW)]
    result = forks.run(command, cwd=ROOT, env=env, timeout=500)
    assert "2 process(es)" in result.stdout, result.stderr
    assert "trained 3 steps" in result.stdout, result.stderr  # DeepSpeed may abort after it, when the interpreter ends
    return read_lines(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory) -> list[dict]:
    return train("ddp", tmp_path_factory.mktemp("ddp") / "run")


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    """Two runs have learnt the same from the same samples."""
    assert len(rows) == len(expected) == 3
    for one, other in zip(rows, expected, strict=True):
        for key in COMPARED:
            assert one[key] == pytest.approx(other[key], abs=TOLERANCE), key


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_sharded_training_is_the_same_training(unsharded, tmp_path, name):
    pytest.importorskip("deepspeed")
    assert_same(train(name, tmp_path / "run"), unsharded)
    written = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "global_step3").iterdir()}
    for rank in (0, 1):  # each process has a part of the optimiser's states, under ZeRO-3 also of the weights
        assert any(f"zero_pp_rank_{rank}_mp_rank_00_optim_states" in file for file in written)
        assert any(f"zero_pp_rank_{rank}_mp_rank_00_model_states" in file for file in written) == (name != "zero2")


def test_fsdp_is_the_same_training(unsharded, tmp_path):
    assert_same(train("fsdp2", tmp_path / "run", "tests.fsdp_run"), unsharded)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists()  # what accelerate writes where it has sharded
    assert load_file(checkpoint / "model.safetensors").keys() == load_file(POLICY).keys()
