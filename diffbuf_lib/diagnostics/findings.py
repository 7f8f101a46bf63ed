"""What the doctor says: findings in the words of findings.yaml, as a table or as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from diffbuf_lib.config import describe_keys
from diffbuf_lib.trace import to_plain

Severity = Literal["error", "warning", "info", "ok"]
_COLOURS: dict[Severity, str] = {"error": "31;1", "warning": "33;1", "info": "36", "ok": "32"}
_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Error: training would fail or learn nonsense. Warning: it would run, worse or slower than meant.
    Info is good to know; ok was looked at and is fine.
    """

    severity: Severity
    check: str  # what was looked at, such as "data.sample_rate"
    message: str  # what was found, in one sentence
    value: Any = None  # what was measured
    limit: Any = None  # what it is measured against
    why: str = ""  # what goes wrong if nothing is done
    fix: str = ""
    config_key: str = ""  # the key to change; empty if the fix is not in the config
    overrides: tuple[str, ...] = ()  # the fix as `--set` arguments, where it is one

    def line(self) -> str:
        """Return severity, message and fix in one line."""
        line = f"{self.severity}: {self.message}"
        return f"{line}: {self.fix}" if self.fix else line


def judge(
    check: str, value: Any = None, limit: Any = None, bad: bool | Severity = False, **facts: Any
) -> Finding:
    """Make a finding in the words of findings.yaml, which also say how severe it is if bad.

    A check such as "model.memory/fails" uses a variant of its words. They may refer to the value,
    the limit and `facts`.
    """
    words = _WORDS.get(check) or _WORDS[f"data.{check.partition('.')[2]}"]
    facts |= {"value": value, "limit": limit}
    name, message = check.partition("/")[0], words["says"].format(**facts)
    overrides, severity = words.get("set", []), words.get("is", "warning")
    key = words.get("key") or "".join(overrides[:1]).partition("=")[0]
    if not bad:
        good: Severity = "info" if severity == "info" else "ok"
        return Finding(good, name, message, value, limit, config_key=key)
    severity = severity if bad is True else bad
    why, fix = words["why"].format(**facts), words["fix"].format(**facts)
    overrides = tuple(override.format(**facts) for override in overrides)
    return Finding(severity, name, message, value, limit, why, fix, key, overrides)


def from_error(error: Exception, check: str, why: str) -> Finding:
    """Make a finding from one of this library's errors: the fix follows the last colon."""
    message, _, fix = str(error).rpartition(": ")
    known = {key for key, *_ in describe_keys()}
    keys = [key for key in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", fix) if key in known]
    overrides = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+=\S+(?<![.,;])", fix)
    if not message:
        message, fix = str(error), "see the message"
    key = keys[0] if keys else ""
    return Finding("error", check, message, None, None, why, fix, key, tuple(overrides[:1]))


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity; equals stay in the order in which they were found."""
    return sorted(findings, key=lambda finding: list(_COLOURS).index(finding.severity))


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """Return `{"ok": bool, "counts": {severity: n}, "findings": [...]}`."""
    told = {"ok": not has_error(findings), "counts": _counts(findings), "findings": findings}
    return json.dumps(to_plain(told), indent=1, allow_nan=False)


def render(findings: Sequence[Finding], *, colour: bool = False, width: int = 100) -> str:
    """Return a table for people, `width` columns wide; with ANSI colours for a terminal."""
    column = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (12 + column)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False)
    lines: list[str] = []
    for finding in findings:
        parts = {"": finding.message, "why: ": finding.why, "fix: ": finding.fix}
        parts["--set "] = " --set ".join(finding.overrides)
        texts = [wrapper.fill(indent + word + text) for word, text in parts.items() if text]
        badge = f"{finding.severity:8}"
        if colour:
            badge = f"\x1b[{_COLOURS[finding.severity]}m{badge}\x1b[0m"
        body = "\n".join(texts)[10 + column :]
        lines.append(f"{badge}  {finding.check:{column}}{body}")
    total = ", ".join(f"{count} {severity}" for severity, count in _counts(findings).items())
    return "\n".join([*lines, "", total])


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    severities = [finding.severity for finding in findings]
    return {severity: severities.count(severity) for severity in _COLOURS}
