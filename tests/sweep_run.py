"""A launcher for tests/test_sweep.py: leaves what a run leaves, or fails, or stops half-way, as control.json says."""

import json
import sys
from pathlib import Path

from align.load import load_config

_, control, module, name, config, *overrides = sys.argv
told = json.loads(Path(control).read_text())
resume = [text.removeprefix("--resume=") for text in overrides if text.startswith("--resume=")]
run = load_config(config.removeprefix("--config="), [text for text in overrides if not text.startswith("--resume=")])
folder = Path(run.output)
assert (module, name) == ("-m", "align.train")
assert resume == ([str(folder)] if (folder / "config.json").exists() else [])
with Path(control).with_name("calls").open("a") as calls:
    calls.write(f"{folder.name} {bool(resume)}\n")
print("working", flush=True)
if folder.name in told["fail"]:
    sys.exit("error: nothing works today")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(run.model_dump(mode="json")))
steps = 1 if folder.name in told["stop"] else run.steps
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step + 1}) + "\n" for step in range(steps)))
checkpoint = folder / "checkpoints" / f"checkpoint-{steps}"
checkpoint.mkdir(parents=True)
(checkpoint / "paretune.json").write_text("{}")
sys.exit(1)  # as some launchers end, though the run is complete
