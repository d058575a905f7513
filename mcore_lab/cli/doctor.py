"""`mcore-lab doctor`: what this machine has, what that allows, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from mcore_lab.cli.arguments import Parser
from mcore_lab.cli.diagnosis import Finding, diagnose
from mcore_lab.report.tables import print_json, print_table


def main(argv: Sequence[str]) -> int:
    """Say what this machine has for training; return 0 if it can train on CPU, else 1."""
    parser = Parser(prog="mcore-lab doctor", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    findings = diagnose()
    ok = all(finding.ok for finding in findings if finding.needed)
    if as_json:
        listed = [asdict(finding) | {"state": finding.state} for finding in findings]
        print_json({"ok": ok, "findings": listed})
    else:
        print_table(("what", "state", "found", "for"), [_row(finding) for finding in findings])
        print("", *_to_add(findings), _verdict(findings), sep="\n")
    return 0 if ok else 1


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return finding.name, finding.state, finding.found.partition("\n")[0][:60], finding.allows


def _to_add(findings: Sequence[Finding]) -> list[str]:
    absent = [finding for finding in findings if finding.fix and not finding.ok]
    fixes = [f"  {finding.name}: {finding.fix}" for finding in absent]
    return ["To add what is not there:", *fixes, ""] if fixes else []


def _verdict(findings: Sequence[Finding]) -> str:
    missing = [finding.name for finding in findings if finding.needed and not finding.ok]
    if missing:
        return f"This machine cannot train yet: {', '.join(missing)} must be put right first."
    ok = {finding.name: finding.ok for finding in findings}
    where = "on its GPUs and on CPU" if ok["GPUs"] and ok["NCCL"] else "on CPU"
    return f"This machine can train {where}: mcore-lab run tp2_gpt --nproc 2"
