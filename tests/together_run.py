"""Two processes that fail in turn: python -m tests.together_run; prints what each of them saw."""

from accelerate import PartialState

from align.launch import relaunch_on_cpu
from align.together import from_main, together
from rollout.sampler import RolloutError


def main() -> None:
    """Fail on one process at a time, once with each kind of error."""
    relaunch_on_cpu("tests.together_run", [])
    state = PartialState(cpu=True)

    def fail(rank: int, kind: type[Exception]) -> str:
        if state.process_index == rank:
            raise kind(f"broken on {rank}")
        return "fine"

    for rank, kind in ((0, RolloutError), (1, RolloutError), (1, ZeroDivisionError), (9, ValueError)):
        try:
            seen = together(lambda rank=rank, kind=kind: fail(rank, kind))
        except Exception as error:
            seen = f"{type(error).__name__}({error})"
        print(f"rank {state.process_index}: {kind.__name__} on {rank}: {seen}", flush=True)
    print(f"rank {state.process_index}: main says {from_main(lambda: 40 + state.process_index)}", flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
