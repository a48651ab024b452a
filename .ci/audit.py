"""Asks an advisory service about every package of requirements.lock: `python
.ci/audit.py`, with pip-audit installed.

Exit code 1 for a known weakness. A service that gives no answer is a sentence, not a
failure.
"""

import json
import subprocess
import sys

AUDIT = "-m pip_audit --disable-pip --require-hashes --requirement requirements.lock --format json --progress-spinner off"


def main() -> int:
    """Prints what is known; returns the exit code."""
    command = [sys.executable, *AUDIT.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"The advisory service gave no answer, nothing was audited: {reason}")
        return 0
    weak = [package for package in packages if package.get("vulns")]
    for package in weak:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            print(
                f"{package['name']} {package['version']}: {found['id']}, mended in {mended}"
            )
    print(f"{len(packages)} packages audited, {len(weak)} with a known weakness.")
    return 1 if weak else 0


if __name__ == "__main__":
    sys.exit(main())
