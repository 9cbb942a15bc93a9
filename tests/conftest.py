"""What all tests share."""

import gc
import os
import signal

# Two test processes share the machine's cores; spinning OpenMP threads would only take turns. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A developer's own settings must not reach the tests.
for _name in ("KANGAROO_DATA_CACHE", "KANGAROO_TRAINER", "KANGAROO_ATTEMPT", "KANGAROO_THREADS"):
    os.environ.pop(_name, None)
# A shell's background jobs begin with Ctrl-C ignored, and would hand that on to the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch and the like are a million objects that stay: to look for garbage among them took an eighth of the time.
gc.set_threshold(10_000)


def pytest_collection_finish() -> None:
    gc.freeze()
