"""Rules about the self-test: both layouts answered, with the same tokens, and nothing is left."""

from collections.abc import Iterator

from nodeserve.cli.doctor.findings import OK, PROBLEM, Finding, size
from nodeserve.cli.doctor.selftest import FIRST_WORDS, TEXTS, Outcome, Run

BUG = "repair what is marked above; where nothing is, this is a bug worth a report"


def judge_selftest(outcome: Outcome) -> list[Finding]:
    where = f"GPU {outcome.gpus}" if outcome.gpus else "CPU workers"
    intro = _finding("selftest-model", OK, f"{outcome.model} on {where}")
    found = [intro, *(finding for run in outcome.runs for finding in _run(run))]
    if all(run.error is None for run in outcome.runs):
        found += [_compared(*outcome.runs), *_meaning(outcome)]
    return found


def _finding(check: str, mark: str, text: str, advice: str = "") -> Finding:
    return Finding("selftest", check, mark, text, advice)


def _run(run: Run) -> Iterator[Finding]:
    if run.error is not None:
        yield _finding("selftest-run", PROBLEM, f"{run.layout}: {run.error}", BUG)
    else:
        yield _answered(run)
    if run.left_behind:
        text = f"{run.layout} left behind: {', '.join(run.left_behind)}"
        yield _finding("selftest-clean", PROBLEM, text, "remove it by hand")


def _answered(run: Run) -> Finding:
    count = sum(map(len, run.tokens))
    text = (
        f"{run.layout}: ready after {run.start_s:.1f} s, {count} tokens for {len(run.tokens)}"
        f" prompts in {run.answer_s:.2f} s; {run.kernels}"
    )
    if run.layout == "1m":
        return _finding("selftest-run", OK, text)
    text += f"; {run.num_handoffs} handoffs, {size(run.handoff_bytes)}, {run.handoff}"
    if run.num_handoffs < len(run.tokens) or run.handoff_bytes == 0:
        return _finding("selftest-run", PROBLEM, f"{text}: fewer handoffs than prompts", BUG)
    return _finding("selftest-run", OK, text)


def _compared(one: Run, other: Run) -> Finding:
    """The first difference is what helps to find its cause."""
    for number, (left, right) in enumerate(zip(one.tokens, other.tokens, strict=True), 1):
        for place, pair in enumerate(zip(left, right, strict=False), 1):
            if pair[0] != pair[1]:
                text = (
                    f"prompt {number}, token {place}: {pair[0]} from {one.layout}, {pair[1]} from"
                    f" {other.layout}"
                )
                return _finding("selftest-tokens", PROBLEM, text, BUG)
        if len(left) != len(right):
            text = f"prompt {number}: {len(left)} tokens from {one.layout}, {len(right)} from"
            return _finding("selftest-tokens", PROBLEM, f"{text} {other.layout}", BUG)
    count = sum(map(len, one.tokens))
    if count == 0:
        return _finding("selftest-tokens", PROBLEM, "no token came", BUG)
    text = f"the {count} tokens of {other.layout} are those of {one.layout}"
    return _finding("selftest-tokens", OK, text)


def _meaning(outcome: Outcome) -> Iterator[Finding]:
    """Both layouts may be wrong in the same way; the demo model's words are known."""
    if not outcome.is_demo_model:
        return
    words = outcome.runs[0].texts[0]
    text = f'"{TEXTS[0]}" goes on with "{words.strip()[:40]}..."'.replace("\n", " ")
    if words.startswith(FIRST_WORDS):
        yield _finding("selftest-words", OK, text)
    else:
        expected = f"{text}, not with{FIRST_WORDS!s}"
        yield _finding("selftest-words", PROBLEM, expected, BUG)
