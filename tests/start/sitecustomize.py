"""Python reads this first in the processes that tests start. To look for garbage among imports takes a fifth longer."""

import gc

gc.set_threshold(500_000)
