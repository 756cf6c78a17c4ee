"""Peak memory of `eigenzoo fit`, as a process of its own, on 100 and on 200 adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.collection import write_adapters

COUNTS = (100, 200)
CHOICES = {
    "axes models, k = 16": ["--rank", "16"],
    "axes outputs, inputs, 16 each": ["--axes", "outputs,inputs", "--rank", "16"],
    "view factors, k = 16": ["--view", "factors", "--rank", "16"],
}


def measure(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """Return peak memory (bytes) and time (s) per choice and number of adapters; everything is made in a temporary folder."""
    rows: list[dict[str, Any]] = []
    # Moments that one choice has kept would spare the next its pass.
    environment = {**os.environ, "EIGENZOO_CACHE": "off"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder / "zoo", max(counts))
        paths = sorted(str(path) for path in (folder / "zoo").iterdir())
        for choice, arguments in CHOICES.items():
            for count in counts:
                listing = folder / "zoo.txt"
                listing.write_text("\n".join(paths[:count]))
                command = [
                    sys.executable,
                    "-m",
                    "eigenzoo",
                    "fit",
                    str(listing),
                    "-o",
                    str(folder / "bundle"),
                    "--force",
                    "--json",
                ]
                done = subprocess.run(
                    [*command, *arguments], check=True, capture_output=True, text=True, env=environment
                )
                report = json.loads(done.stdout)
                rows.append(
                    {
                        "choice": choice,
                        "num_models": count,
                        "peak_memory": report["peak_memory"],
                        "seconds": report["seconds"],
                    }
                )
    return rows


def main() -> None:
    """Print the table."""
    print(f"{'fit of 4 layers q/k/v, hidden 4096, kv 1024, rank 16':<54}{'adapters':>9}{'peak memory':>13}{'time':>8}")
    for row in measure():
        print(f"{row['choice']:<54}{row['num_models']:>9}{row['peak_memory'] / 1e6:>10.0f} MB{row['seconds']:>6.1f} s")


if __name__ == "__main__":
    main()
