"""Examples at the end of each command's help, and a link to its page."""

from __future__ import annotations

from typing import NamedTuple


class Examples(NamedTuple):
    """Command lines without `eigenzoo`, and the documentation page of a command."""

    lines: tuple[str, ...]
    page: str


EXAMPLES: dict[str, Examples] = {
    "inspect": Examples(("inspect adapters/", "inspect 'checkpoints/*' --exclude 'classifier.*' --json"), "formats.md"),
    "fit": Examples(
        (
            "fit adapters/ -o bundle --axes outputs,inputs --budget 5MB",
            "fit 'checkpoints/*' -o bundle --rank 16 --view delta --base base/",
            "fit s3://bucket/adapters -o bundle --rank auto",
        ),
        "scale.md",
    ),
    "plan": Examples(("plan adapters/", "plan adapters/ --axes outputs,inputs --json"), "formats.md"),
    "evidence": Examples(("evidence adapters/", "evidence bundle --json"), "evidence.md"),
    "adapt": Examples(
        (
            "adapt bundle reviews.csv --model base/ -o task.safetensors",
            "adapt bundle reviews.csv --model base/ --random-basis",
        ),
        "adapt.md",
    ),
    "project": Examples(("project bundle adapters/unseen", "project bundle new1 new2 --json"), "api.md"),
    "rebuild": Examples(
        ("rebuild bundle task-3 -o rebuilt/", "rebuild bundle adapters/unseen -o rebuilt/ --max-lora-rank 16"),
        "formats.md",
    ),
    "add": Examples(
        ("add bundle adapters/new1 adapters/new2 -o grown", "add bundle new1 -o grown --refresh"), "api.md"
    ),
    "merge": Examples(
        (
            "merge adapters/code adapters/math -o merged --method ties --keep 0.3",
            "merge adapters/* -o merged --method tsv --rank 32",
            "merge adapters/code adapters/math --method linear --weights 0.7,0.3 --check",
        ),
        "merge.md",
    ),
    "serve": Examples(
        ("serve bundle --model base/", "serve bundle --model base/ --port 0 --only task-3 --only task-7"), "serve.md"
    ),
    "route": Examples(
        (
            "route bundle inputs.npy --examples labelled.safetensors",
            "route bundle inputs.npy --examples labelled.safetensors -o mix.safetensors",
            "route bundle inputs.npy --examples labelled.safetensors --alpha 0.01 --json",
        ),
        "route.md",
    ),
    "import": Examples(
        ("import vlora/ -o bundle --like adapters/one", "import components/ -o bundle --alpha 32"), "import.md"
    ),
    "verify": Examples(("verify bundle", "verify adapters/one --against base/"), "verify.md"),
    "evaluate": Examples(
        (
            "evaluate bundle --metric mine:accuracy --models heldout/",
            "evaluate bundle --metric mine:accuracy --models heldout/ --ranks 1,4,16",
        ),
        "evidence.md",
    ),
    "push": Examples(("push bundle org/name", "push bundle org/name@branch --private"), "hub.md"),
    "report": Examples(("report adapters/ -o report.html", "report bundle -o figures --format png"), "report.md"),
    "demo": Examples(("demo", "demo -o demo-lora --kind digits-lora"), "findings.md"),
    "nursery make": Examples(
        ("nursery make digits-vit -o zoo", "nursery make docstrings-lora -o adapters --num-models 30"), "findings.md"
    ),
}


def epilog(command: str) -> str:
    """Return the end of a command's help."""
    lines, page = EXAMPLES[command]
    return "\n\n".join(("Examples:", *(f"eigenzoo {line}" for line in lines), f"More: docs/{page}"))
