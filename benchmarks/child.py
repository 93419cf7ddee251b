"""The process of one side: `python -m benchmarks.child MODULE SPEC` prints `MODULE.measure(SPEC)` as JSON."""

import contextlib
import importlib
import json
import sys


def main() -> None:
    """Measure; whatever the libraries print goes to stderr."""
    module, spec = sys.argv[1], json.loads(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        result = importlib.import_module(module).measure(spec)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
