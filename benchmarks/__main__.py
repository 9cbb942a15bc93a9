"""List the benchmarks, or run one: `python -m benchmarks NAME [arguments]`."""

import runpy
import sys
from pathlib import Path

scripts = {path.stem: path for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}

if len(sys.argv) > 1 and sys.argv[1] in scripts:
    name = sys.argv.pop(1)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
else:
    print("python -m benchmarks NAME [arguments]\n")
    for name, path in scripts.items():
        summary = path.read_text().split('"""')[1].strip().splitlines()[0]
        print(f"  {name:<10} {summary}")
    sys.exit(0 if len(sys.argv) == 1 else 2)
