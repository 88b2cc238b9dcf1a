"""Check that the embedded default learned what it says: python .ci/check_tiny.py summary.json."""

import json
import pathlib
import sys

LIMITS = {  # (phase, temperature): what the accuracy on suite `chain` must be
    ("prior", 0.0): lambda a: a <= 0.6,
    ("prior", 1.0): lambda a: a <= 0.3,
    ("rl", 0.0): lambda a: a >= 0.95,
    ("rl", 1.0): lambda a: a >= 0.8,
}

summary = json.loads(pathlib.Path(sys.argv[1]).read_text())
last = {(e["phase"], e["temperature"]): e for e in summary["evaluations"] if e["suite"] == "chain"}
failed = [key for key, holds in LIMITS.items() if not holds(last[key]["accuracy"]) or last[key]["n"] < 500]
for (phase, temperature), e in last.items():
    print(f"{phase:6} T={temperature:g}  {e['accuracy']:.3f} [{e['low']:.3f}, {e['high']:.3f}]  n={e['n']}")
print(f"wall {summary['wall_s']:.0f} s, {summary['steps']} steps")
if failed:
    sys.exit(f"out of bounds: {failed}")
