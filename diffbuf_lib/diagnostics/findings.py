"""What the doctor says: findings, sorted by how bad they are, as a table or as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from diffbuf_lib.config import describe_keys
from diffbuf_lib.trace import to_plain

Severity = Literal["error", "warning", "info", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info", "ok")
_COLOURS = {"error": "31;1", "warning": "33;1", "info": "36", "ok": "32"}
_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    An error means that training would fail or learn nonsense, a warning that it will run, worse or
    slower than meant; info is good to know, and ok was looked at and is fine.
    """

    severity: Severity
    check: str  # what was looked at, such as "data.sample_rate"
    message: str  # what was found, in one sentence
    value: Any = None  # what was measured
    limit: Any = None  # what it is measured against
    why: str = ""  # what goes wrong if nothing is done
    fix: str = ""  # what to do
    config_key: str = ""  # the key to change; empty if the fix is not in the config
    overrides: tuple[str, ...] = ()  # the fix as `--set` arguments, where it is one

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON can hold them."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def line(self) -> str:
        """Return severity, message and fix in one line."""
        line = f"{self.severity}: {self.message}"
        return f"{line}: {self.fix}" if self.fix else line


def judge(
    check: str,
    value: Any = None,
    limit: Any = None,
    *,
    error: bool = False,
    warning: bool = False,
    info: bool = False,
    **facts: Any,
) -> Finding:
    """Make a finding in the words of findings.yaml; one that is neither bad nor info is ok.

    Args:
        check: such as "frames.buffer"; with a variant of its words, "model.memory/fails".
        value: what was measured.
        limit: what it is measured against.
        error: whether it is one.
        warning: whether it is one.
        info: whether it is only good to know.
        facts: what the words name beside value and limit.
    """
    words = _WORDS.get(check) or _WORDS[f"data.{check.partition('.')[2]}"]
    facts |= {"value": value, "limit": limit}
    told = partial(Finding, check=check.partition("/")[0], value=value, limit=limit)
    message, overrides = words["says"].format(**facts), words.get("set", [])
    key = words.get("key") or "".join(overrides[:1]).partition("=")[0]
    if not (error or warning):
        return told("info" if info else "ok", message=message, config_key=key)
    return told(
        "error" if error else "warning",
        message=message,
        why=words["why"].format(**facts),
        fix=words["fix"].format(**facts),
        config_key=key,
        overrides=tuple(override.format(**facts) for override in overrides),
    )


def from_error(error: Exception, check: str, why: str) -> Finding:
    """Make a finding of one of this library's errors: the fix follows the last colon."""
    message, _, fix = str(error).rpartition(": ")
    named = (key for key, *_ in describe_keys() if re.search(rf"\b{re.escape(key)}\b", fix))
    found = re.search(r"\b([a-z_]+(?:\.[a-z_]+)+=\S+)", fix)
    return Finding(
        "error",
        check,
        message or str(error),
        why=why,
        fix=fix if message else "see the message",
        config_key=next(named, ""),
        overrides=(found.group(1).rstrip(".,;"),) if found else (),
    )


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity; equals stay in the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """Return `{"ok": bool, "counts": {severity: n}, "findings": [...]}`."""
    told = {
        "ok": not has_error(findings),
        "counts": _counts(findings),
        "findings": [finding.to_dict() for finding in findings],
    }
    return json.dumps(told, indent=1, allow_nan=False)


def render(findings: Sequence[Finding], *, colour: bool = False, width: int = 100) -> str:
    """Return a table for people.

    Args:
        findings: in the order to print them.
        colour: whether to use ANSI colours: on a terminal only.
        width: of the terminal, columns.
    """
    column = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (12 + column)
    wrapper = textwrap.TextWrapper(
        max(40, width - len(indent)), subsequent_indent="  ", break_on_hyphens=False
    )
    lines: list[str] = []
    for finding in findings:
        badge = f"{finding.severity:8}"
        if colour:
            badge = f"\x1b[{_COLOURS[finding.severity]}m{badge}\x1b[0m"
        body = [finding.message]
        if finding.severity in ("error", "warning"):
            body += [f"why: {finding.why}"] if finding.why else []
            body += [f"fix: {finding.fix}"] if finding.fix else []
            body += [" ".join(f"--set {override}" for override in finding.overrides)]
        first, *rest = (line for text in body for line in wrapper.wrap(text))
        lines += [f"{badge}  {finding.check:{column}}  {first}", *(indent + line for line in rest)]
    total = ", ".join(f"{count} {severity}" for severity, count in _counts(findings).items())
    return "\n".join([*lines, "", total])


def _counts(findings: Iterable[Finding]) -> dict[str, int]:
    counts = Counter(finding.severity for finding in findings)
    return {severity: counts[severity] for severity in SEVERITIES}
