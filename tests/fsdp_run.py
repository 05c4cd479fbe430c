"""FSDP2 on a CPU, for tests: python -m tests.fsdp_run ARGUMENTS OF align.train.

accelerate 1.15 shards on GPUs only: told to use FSDP on a CPU, it trains unsharded and says nothing. torch's FSDP2 itself
works over gloo.
"""

import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState


def shard_on_cpu() -> None:
    """Let the accelerators of this process shard where the launcher asked for FSDP."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    from align.train import main

    shard_on_cpu()
    sys.exit(main())
