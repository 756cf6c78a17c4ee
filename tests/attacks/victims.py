"""What a victim does with what an attacker sent: the commands, by the kind of thing that was sent."""

from __future__ import annotations

from pathlib import Path

from attack_runner import Sandbox, Words


def use_model(
    sandbox: Sandbox, model: Path, *flags: str, kind: str = "zoo", thorough: bool | None = False
) -> list[Words]:
    """A model: looked at; unless `thorough` is None projected; when it is true, whatever else reads one."""
    if thorough is None:
        return [("inspect", model, *flags)]
    zoo = sandbox.copy(kind)
    bundle = sandbox.copy("bundle" if kind == "zoo" else "adapters_bundle")
    together = (zoo / "m0", zoo / "m1", zoo / "m2", model)
    commands: list[Words] = [
        ("inspect", model, *flags),
        ("project", bundle, model, *flags),
    ]
    if thorough:
        commands += [
            ("fit", *together, "-o", "out", "--rank", 1, *flags),
            ("evidence", *together, *flags),
            ("plan", *together, *flags),
            ("report", *together, "-o", "out.md", *flags),
            ("add", bundle, model, "-o", "out", *flags),
            ("rebuild", bundle, model, "-o", "out", *flags),
        ]
    return commands


def use_zoo(sandbox: Sandbox, zoo: object, *flags: str) -> list[Words]:
    """A folder, list or glob of models."""
    return [
        ("inspect", zoo, *flags),
        ("fit", zoo, "-o", "out", "--rank", 1, *flags),
        ("evidence", zoo, *flags),
        ("plan", zoo, *flags),
        ("report", zoo, "-o", "out.html", *flags),
    ]


def use_bundle(sandbox: Sandbox, bundle: Path, *, thorough: bool = False, name: str = "m0") -> list[Words]:
    """A bundle: verified, a model rebuilt; when `thorough`, whatever else reads one."""
    commands: list[Words] = [("verify", bundle), ("rebuild", bundle, name, "-o", "out")]
    if thorough:
        model = sandbox.copy("zoo") / "m3"
        commands += [
            ("project", bundle, model),
            ("add", bundle, model, "-o", "out"),
            ("evidence", bundle),
            ("report", bundle, "-o", "out.html"),
            ("evaluate", bundle, "--metric", "os.path:getsize"),
            ("rebuild", bundle, sandbox.copy("task.safetensors"), "-o", "out"),
        ]
    return commands
