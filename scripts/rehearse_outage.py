"""A judge is killed half-way through a run, and comes back: the run pauses, goes on, and has lost nothing.

    python scripts/rehearse_outage.py [--output runs/outage] [--steps 6] [--away 10]

The built-in task is trained twice with a judge in the place of one objective: an endpoint of OpenAI's kind, in a process of
its own, that gives each answer a score from its characters alone. The second time the judge is killed (SIGKILL) when half of
the steps are done, and started again after some seconds. The last line of stdout is a JSON object: how often and for how
long the run paused, and whether metrics and samples of the two runs are equal, byte for byte.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESPONSE = re.compile(r"<<<RESPONSE [0-9a-f]+\n(.*)\n[0-9a-f]+ RESPONSE>>>", re.DOTALL)


def main() -> None:
    """Both runs, and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/outage", help="folder that is not there yet (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--away", type=float, default=10.0, help="seconds that the judge is away (default: %(default)s)")
    options = parser.parse_args()
    port, judge = free_port(), None
    try:
        judge = start_judge(port)
        straight, killed = Path(options.output) / "straight", Path(options.output) / "killed"
        with start_run(straight, options.steps, port) as run:
            ended = [run.wait()]
        with start_run(killed, options.steps, port) as run:
            while lines(killed / "metrics.jsonl") < options.steps // 2 and run.poll() is None:
                time.sleep(0.01)
            judge.kill()
            print(f"the judge is killed after step {lines(killed / 'metrics.jsonl')}", file=sys.stderr, flush=True)
            time.sleep(options.away)
            judge = start_judge(port)
            print("the judge is back", file=sys.stderr, flush=True)
            ended.append(run.wait())
    finally:
        if judge:
            judge.kill()
    timings = [json.loads(line) for line in (killed / "timings.jsonl").read_text().splitlines()]
    paused = {key: sum(row.get(f"time/{key}", 0.0) for row in timings) for key in ("pauses", "paused")}
    files = ["metrics.jsonl", *(str(path.relative_to(straight)) for path in sorted(straight.glob("samples/*")))]
    equal = all((straight / file).read_bytes() == (killed / file).read_bytes() for file in files)
    print(json.dumps({"ended": ended, **paused, "files": len(files), "equal": equal}))


def start_run(folder: Path, steps: int, port: int) -> subprocess.Popen:
    """A run of the built-in task whose brevity is judged."""
    args = {"url": f"http://127.0.0.1:{port}/v1", "model": "judge", "rubric": "How varied is it?", "key_variable": ""}
    judged = {"reward": "judge", "args": args, "calls": {"retries": 1}}
    command = [sys.executable, "-m", "align.cli", "train", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += [f"--output={folder}", f"--steps={steps}", "--weighting.type=fixed", "--evaluation.every=0"]
    command += [f"--objectives.brevity={json.dumps(judged)}", "--checkpoint.every=100", "--scoring={pause: 2, pauses: 60}"]
    command += ["--weighting.weights={accuracy: 0.6, brevity: 0.2, clarity: 0.2}"]
    return subprocess.Popen(command, stdout=sys.stderr)


def start_judge(port: int) -> multiprocessing.Process:
    """A judge that answers at that port once this returns."""
    process = multiprocessing.get_context("spawn").Process(target=be_judge, args=(port,), daemon=True)
    process.start()
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.05)
    return process


def be_judge(port: int) -> None:
    """Serve until killed."""
    from aiohttp import web

    async def chat(request: web.Request) -> web.Response:
        asked = (await request.json())["messages"][-1]["content"]
        verdict = {"reason": "", "score": min(10, len(set(RESPONSE.search(asked)[1])))}
        await asyncio.sleep(0.02)
        message = {"role": "assistant", "content": json.dumps(verdict)}
        return web.json_response({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": []})

    app = web.Application()
    app.add_routes(
        [web.post("/v1/chat/completions", chat), web.get("/v1/models", lambda _: web.json_response({"data": []}))]
    )
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def lines(path: Path) -> int:
    """Of a file, 0 where there is none."""
    return path.read_text().count("\n") if path.exists() else 0


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
