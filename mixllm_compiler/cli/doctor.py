"""`mixllm doctor`: what this machine has, and what is missing."""

from __future__ import annotations

from .verb import Output


def doctor() -> Output:
    """Check versions, torch's private interfaces, devices, compilers and the build cache.

    The exit code is 1 if something that the compiler needs is missing.

    Examples:
        mixllm doctor
        mixllm doctor --json
    """
    import dataclasses

    from ..report.health import checkup
    from ..report.terminal import checks_table

    checks = checkup()
    failed = any(check.state == "missing" for check in checks)
    return Output(
        {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]},
        [checks_table(checks)],
        failed,
    )
