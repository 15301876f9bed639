"""Freed memory stays in the process: temporaries that come again cost no page faults."""

import subprocess
import sys

PROGRAM = """
import resource, sys
import numpy as np
from recsys.memory import keep_freed_memory

def use():
    parts = [np.ones(2**20) for _ in range(4)]  # 8 MiB each
    del parts

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_temporaries_that_come_again_cost_no_page_faults():
    def run(how: str) -> tuple[str, int]:
        found = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        kept, faults = found.stdout.split()
        return kept, int(faults)

    kept, faults = run("keep")
    if kept == "True":  # else there is no glibc
        assert faults < 200 < run("not")[1]
