"""What the doctor says: findings, sorted by how bad they are, as a table or as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info", "ok")
_COLOURS = {"error": "31;1", "warning": "33;1", "info": "36", "ok": "32"}
_RESET = "\x1b[0m"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        severity: "error": training would fail or learn nonsense; "warning": it will run, worse or
            slower than meant; "info": good to know; "ok": looked at, and fine.
        check: what was looked at, such as "data.sample_rate".
        message: what was found, in one sentence.
        value: what was measured.
        limit: what it is measured against.
        why: what goes wrong if nothing is done.
        fix: what to do.
        config_key: the key to change; empty if the mend is not in the config.
        overrides: the fix as `--set` arguments, where it is one.
    """

    severity: Severity
    check: str
    message: str
    value: Any = None
    limit: Any = None
    why: str = ""
    fix: str = ""
    config_key: str = ""
    overrides: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON can hold them."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def line(self) -> str:
        """Return severity, message and fix in one line."""
        line = f"{self.severity}: {self.message}"
        return f"{line}: {self.fix}" if self.fix else line


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity; equals stay in the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """Return `{"ok": bool, "counts": {severity: n}, "findings": [...]}`."""
    counts = Counter(finding.severity for finding in findings)
    return json.dumps(
        {
            "ok": not has_error(findings),
            "counts": {severity: counts[severity] for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in findings],
        },
        indent=1,
        allow_nan=False,
    )


def render(findings: Sequence[Finding], *, colour: bool = False, width: int = 100) -> str:
    """Return a table for people.

    Args:
        findings: in the order to print them.
        colour: whether to use ANSI colours: on a terminal only.
        width: of the terminal, columns.
    """
    column = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (12 + column)
    lines: list[str] = []
    for finding in findings:
        badge = f"{finding.severity:8}"
        if colour:
            badge = f"\x1b[{_COLOURS[finding.severity]}m{badge}{_RESET}"
        body = [finding.message]
        if finding.severity in ("error", "warning"):
            body += [f"{name}: {text}" for name, text in (("why", finding.why),) if text]
            body += [f"fix: {finding.fix}"] if finding.fix else []
            body += [" ".join(f"--set {override}" for override in finding.overrides)]
        wrapped = [
            line
            for text in body
            if text
            for line in textwrap.wrap(
                text, max(40, width - len(indent)), subsequent_indent="  ", break_on_hyphens=False
            )
        ]
        lines.append(f"{badge}  {finding.check:{column}}  {wrapped[0]}")
        lines += [f"{indent}{line}" for line in wrapped[1:]]
    counts = Counter(finding.severity for finding in findings)
    total = ", ".join(f"{counts[severity]} {severity}" for severity in SEVERITIES)
    return "\n".join([*lines, "", total])


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; what is not finite as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)
