"""Merging of model folders, checkpoints of LoRA and runs: what comes out, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from align import merge as merging
from align.cli import main
from align.load import load_config
from align.merge_methods import task_singular_vectors
from tests import weights_run
from tests.conftest import QUICKSTART, ROOT

TOKENIZER = ROOT / "align" / "policies" / "arithmetic"


def save(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A complete model folder."""
    model.to(dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def trained(seed: int, tied: bool = False):
    """The small policy after a little of what training might do to it."""
    model = weights_run.policy(lora=False, tied=tied)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `base`, and `a`, `b`, `c` that were trained from it."""
    folder = tmp_path_factory.mktemp("models")
    save(weights_run.policy(lora=False), folder / "base")
    for seed, name in enumerate("abc", 1):
        save(trained(seed), folder / name)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one sentence about it."""
    assert merge(*arguments) == 2
    return capsys.readouterr().err


# --- soups ------------------------------------------------------------------------------------------------------------


def test_a_grid_of_soups(folder: Path, tmp_path: Path, capsys):
    assert merge(folder / "a", folder / "b", "--grid=4", "--output", tmp_path / "soups") == 0
    assert sorted(path.name for path in (tmp_path / "soups").iterdir()) == [
        "0.25_0.75",
        "0.5_0.5",
        "0.75_0.25",
        "0_1",
        "1_0",
    ]
    a, b = weights(folder / "a"), weights(folder / "b")
    assert_same_bits(weights(tmp_path / "soups" / "1_0"), a)
    assert_same_bits(weights(tmp_path / "soups" / "0_1"), b)
    for name, tensor in weights(tmp_path / "soups" / "0.25_0.75").items():
        assert torch.equal(tensor, (0.25 * a[name].double() + 0.75 * b[name].double()).float())
    assert f"0.25 × {folder / 'a'} + 0.75 × {folder / 'b'}" in capsys.readouterr().out

    made = tmp_path / "soups" / "0.5_0.5"
    about = json.loads((made / "merge.json").read_text())
    assert (about["method"], about["coefficients"], about["samples"]) == ("soup", [0.5, 0.5], None)
    assert [parent["folder"] for parent in about["parents"]] == [str(folder / "a"), str(folder / "b")]
    logits = AutoModelForCausalLM.from_pretrained(made)(torch.tensor([[1, 2]])).logits
    assert logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(made).get_vocab() == AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_parents_give_that_parent(tmp_path: Path, dtype):
    parent = save(trained(1), tmp_path / "a", dtype)
    assert merge(parent, parent, parent, "--weights=.3/.3/.4", "--output", tmp_path / "out") == 0
    assert_same_bits(weights(tmp_path / "out" / "0.3_0.3_0.4"), weights(parent))
    assert json.loads((tmp_path / "out" / "0.3_0.3_0.4" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_a_parent_that_takes_no_part_cannot_spoil_it(folder: Path, tmp_path: Path):
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights(folder / "b").items()}
    shutil.copytree(folder / "b", tmp_path / "nan")
    save_file(broken, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    recipe = merging.Recipe("soup", [merging.Parent(merging.locate(str(p))) for p in (folder / "a", tmp_path / "nan")], None,
                            [(1.0, 0.0)])  # fmt: skip
    merging.write_models(recipe, [tmp_path / "one"])
    assert_same_bits(weights(tmp_path / "one"), weights(folder / "a"))


def test_changes_from_a_base_may_be_summed_up(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert "sum to 2" in refused(capsys, folder / "a", folder / "b", "--weights=1/1", "--output", out)
    assert merge(folder / "a", folder / "b", "--weights=1/1", "--base", folder / "base", "--output", out) == 0
    assert "(of the changes from" in capsys.readouterr().out
    base, a, b = (weights(folder / name) for name in ("base", "a", "b"))
    for name, tensor in weights(out / "1_1").items():
        torch.testing.assert_close(tensor, a[name] + b[name] - base[name], rtol=0, atol=1e-6)


def test_tied_weights_stay_tied(tmp_path: Path):
    """One checkpoint has them once, the other under both names."""
    a, b = (save(trained(seed, tied=True), tmp_path / name) for seed, name in ((1, "a"), (2, "b")))
    both = weights(b)
    assert "lm_head.weight" not in both
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, b / "model.safetensors", {"format": "pt"})
    assert merge(a, b, "--output", tmp_path / "out") == 0
    assert "lm_head.weight" not in weights(tmp_path / "out" / "0.5_0.5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "0.5_0.5")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_large_comes_in_several_files(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 60_000)
    assert merge(folder / "a", folder / "b", "--weights", "1/0", ".5/.5", "--output", tmp_path) == 0
    files = sorted((tmp_path / "1_0").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 30_000  # two models at a time
    assert_same_bits(weights(tmp_path / "1_0"), weights(folder / "a"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1_0").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(folder / "a").items())


def test_what_is_there_already_is_left(folder: Path, tmp_path: Path, capsys):
    models = (folder / "a", folder / "b", "--output", tmp_path)
    assert merge(*models, "--weights", ".5/.5") == 0
    before = (tmp_path / "0.5_0.5" / "model.safetensors").stat().st_mtime_ns
    assert merge(*models, "--grid=2") == 0
    assert "(was there already)" in capsys.readouterr().out
    assert (tmp_path / "0.5_0.5" / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "0_1").is_dir()
    message = refused(capsys, folder / "b", folder / "a", "--output", tmp_path)
    assert "0.5_0.5 exists and is not this merge: choose another --output" in message


# --- LoRA -------------------------------------------------------------------------------------------------------------


def adapter(folder: Path, base: Path, seed: int, **options) -> Path:
    """LoRA weights on a base, with a tokenizer as a checkpoint has it."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options, task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def dense(base: Path, lora: Path) -> dict[str, torch.Tensor]:
    """Whole weights as peft merges them."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "lm_head"]}], ids=["plain", "rs", "embeddings"]
)
def test_lora_is_merged_as_a_change_not_factor_by_factor(folder: Path, tmp_path: Path, options):
    a, b = (adapter(tmp_path / name, folder / "base", seed, **options) for seed, name in ((1, "x"), (2, "y")))
    assert merge(a, b, folder / "c", "--weights", "1/0/0", ".2/.5/.3", "--output", tmp_path / "out") == 0
    whole = [dense(folder / "base", a), dense(folder / "base", b), weights(folder / "c")]
    assert_same_bits(weights(tmp_path / "out" / "1_0_0"), whole[0])
    for name, tensor in weights(tmp_path / "out" / "0.2_0.5_0.3").items():
        expected = 0.2 * whole[0][name] + 0.5 * whole[1][name] + 0.3 * whole[2][name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_layers_that_keep_their_weights_transposed(tmp_path: Path):
    torch.manual_seed(0)
    save(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=16)), tmp_path / "base")
    lora = adapter(tmp_path / "x", tmp_path / "base", 1, target_modules=["c_attn"], fan_in_fan_out=True)
    assert merge(lora, tmp_path / "base", "--weights=1/0", "--output", tmp_path / "out") == 0
    expected = dense(tmp_path / "base", lora)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "1_0").state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "trains DoRA besides plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "trains modules_to_save besides plain LoRA"),
        ({"bias": "lora_only"}, "trains biases besides plain LoRA"),
    ],
)
def test_more_than_plain_lora_is_refused(folder: Path, tmp_path: Path, capsys, options, message):
    lora = adapter(tmp_path / "x", folder / "base", 1, **options)
    assert message in refused(capsys, lora, folder / "a", "--output", tmp_path / "out")


# --- task singular vectors --------------------------------------------------------------------------------------------


def test_task_singular_vectors_of_models(folder: Path, tmp_path: Path):
    models, out = (folder / "a", folder / "b", "--method=tsv", "--base", folder / "base"), tmp_path / "out"
    assert merge(*models, "--weights", "1/1", "1/0", "--output", out) == 0
    base, a, b = ({n: t.double() for n, t in weights(folder / name).items()} for name in ("base", "a", "b"))
    for name, tensor in weights(out / "1_1").items():
        deltas = [parent[name] - base[name] for parent in (a, b)]
        change = next(task_singular_vectors(deltas, [(1, 1)])) if tensor.dim() == 2 else sum(deltas) / 2
        assert torch.equal(tensor, (base[name] + change).float())
    for name, tensor in weights(out / "1_0").items():  # a task alone keeps all its singular vectors
        torch.testing.assert_close(tensor, a[name].float(), rtol=0, atol=1e-7)


def test_task_singular_vectors_of_lora(folder: Path, tmp_path: Path, capsys):
    """Both know their base; of rank 4 in 32 dimensions nothing is cut off, and equal ones are one."""
    lora = adapter(tmp_path / "x", folder / "base", 1)
    assert merge(lora, lora, "--method=tsv", "--output", tmp_path / "out") == 0
    expected = dense(folder / "base", lora)
    for name, tensor in weights(tmp_path / "out" / "1_1").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    message = refused(capsys, lora, folder / "a", "--method=tsv", "--output", tmp_path / "other")
    assert "--method tsv merges changes: say by --base from which model" in message


# --- runs, and what is not of one origin ------------------------------------------------------------------------------


def make_run(folder: Path, model: str, weights: Path, step: int) -> Path:
    """A run folder with a checkpoint."""
    folder.mkdir()
    config = load_config(QUICKSTART, [f"--output={folder}", f"--policy.model={model}"])
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (folder / "environment.json").write_text("{}")
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    shutil.copytree(weights, checkpoint)
    state = {"step": step, "micro_step": step, "processes": 2, "fingerprint": "", "weighting": {}}
    (checkpoint / "paretune.json").write_text(json.dumps(state))
    return folder


def test_runs_and_their_checkpoints(folder: Path, tmp_path: Path, capsys):
    base = str(folder / "base")
    a, b = (make_run(tmp_path / f"run-{name}", base, folder / name, step) for name, step in (("a", 4), ("b", 6)))
    checkpoint = b / "checkpoints" / "checkpoint-6"
    assert merge(a, checkpoint, "--output", tmp_path / "out") == 0
    about = json.loads((tmp_path / "out" / "0.5_0.5" / "merge.json").read_text())
    assert [(parent["model"], parent["step"]) for parent in about["parents"]] == [(f"{a}@4", 4), (str(checkpoint), 6)]
    assert about["samples"] == (4 + 6) * 16 * 8
    assert {"tokenizer.json", "merge.json"} < {path.name for path in (tmp_path / "out" / "0.5_0.5").iterdir()}
    assert not (tmp_path / "out" / "0.5_0.5" / "paretune.json").exists()
    assert merge(a, b, "--method=tsv", "--output", tmp_path / "tsv") == 0  # both know their base

    other = make_run(tmp_path / "other", "builtin:arithmetic", folder / "b", 2)
    message = refused(capsys, a, other, "--output", tmp_path / "no")
    assert f"the one started from {base!r}, the other from 'builtin:arithmetic' (policy.model)" in message
    (checkpoint / "paretune.json").unlink()
    assert f"{b} has no complete checkpoint yet" in refused(capsys, a, b, "--output", tmp_path / "no")
    assert "is not a complete checkpoint" in refused(capsys, a, checkpoint, "--output", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def change_json(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def other_tensors(folder: Path, change) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


NORM = "model.norm.weight"
DIFFERENT = {
    "rms_norm_eps of the model is 1e-06 and 0.5": lambda f: change_json(f / "config.json", rms_norm_eps=0.5),
    f"only .*/b has the weight {NORM}.more": lambda f: other_tensors(f, lambda t: t.update({f"{NORM}.more": t[NORM] + 0})),
    f"{NORM} has the shapes .32. and .31.": lambda f: other_tensors(f, lambda t: t.update({NORM: t[NORM][:31].clone()})),
    f"{NORM} has the types torch.float32 and": lambda f: other_tensors(f, lambda t: t.update({NORM: t[NORM].half()})),
    "token .* of the tokenizer is": other_vocabulary,
    "eos_token of the tokenizer is": lambda f: change_json(f / "tokenizer_config.json", eos_token="#"),
    ".* have a cosine of -?0.0.*training moves weights by little": lambda f: other_tensors(
        f, lambda t: t.update({n: torch.randn_like(x) for n, x in t.items() if x.dim() == 2})
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", DIFFERENT, ids=lambda text: text[:30])
def test_policies_of_different_origin_are_refused(folder: Path, tmp_path: Path, capsys, message):
    shutil.copytree(folder / "b", tmp_path / "b")
    DIFFERENT[message](tmp_path / "b")
    found = refused(capsys, folder / "a", tmp_path / "b", "--output", tmp_path / "out")
    assert re.search(f"are not of one origin: {message}", found), found
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_refused(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert "'./absent' is not a folder with a config.json" in refused(capsys, folder / "a", "./absent", "--output", out)
    for name in ("a", "b"):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").unlink()
    assert "has no tokenizer (tokenizer_config.json)" in refused(capsys, tmp_path / "a", tmp_path / "b", "--output", out)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    assert "has no weights in safetensors files" in refused(capsys, tmp_path / "a", folder / "b", "--output", out)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"half of it")
    assert "model.safetensors cannot be read" in refused(capsys, tmp_path / "b", folder / "b", "--output", out)
    weighted = (folder / "a", folder / "b", "--output", out, "--weights")
    assert "two vectors are the same" in refused(capsys, *weighted, ".5/.5", "0.5/0.5")
    other_tensors(save(trained(1), tmp_path / "n"), lambda t: t.update(table=torch.arange(3)))
    other_tensors(save(trained(2), tmp_path / "m"), lambda t: t.update(table=torch.arange(3) + 1))
    message = refused(capsys, tmp_path / "n", tmp_path / "m", "--output", out)
    assert "table is of the type torch.int64 and differs between" in message
