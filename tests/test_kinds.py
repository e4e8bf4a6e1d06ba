"""The short run and the rest are all tests, each once."""

from types import SimpleNamespace

from tests import kinds


def item(test: str, case: str | None = None, *marks: str) -> SimpleNamespace:
    """Return what stands for a collected test."""
    name = test if case is None else f"{test}[{case}]"
    return SimpleNamespace(
        nodeid=f"tests/{name}",
        iter_markers=lambda: [SimpleNamespace(name=mark) for mark in marks],
        **({} if case is None else {"callspec": SimpleNamespace(id=case)}),
    )


def test_every_kind_is_in_the_rest() -> None:
    assert kinds.REST.split(" or ") == list(kinds.KINDS)
    for rules in kinds.RULES.values():
        assert {rule.kind for rule in rules.values()} <= kinds.KINDS.keys()


def test_a_rule_keeps_what_it_names() -> None:
    test = "models/test_families.py::test_log_probs_are_those_of_transformers"
    assert kinds.kinds_of(item(test, "gemma2")) == set()
    assert kinds.kinds_of(item(test, "llama yarn")) == {"parity"}
    assert kinds.kinds_of(item(test, "gemma2", "slow", "data")) == {"slow"}
    whole = "cli/test_judge.py::test_two_kills_and_a_full_disk_lose_nothing"
    assert kinds.kinds_of(item(whole)) == {"kill"}
    other = "objectives/test_objectives.py::test_stays_finite"
    assert kinds.kinds_of(item(other, "dpo,beta=1")) == set()
    assert kinds.kinds_of(item(other, "ipo,f_divergence_type=x")) == {"variants"}


def test_a_rule_that_nothing_answers_to_is_told() -> None:
    drains = "generation/test_server.py::test_sigterm_drains"
    wrong = kinds.stale([])
    assert f"{drains}[*]" in wrong
    greedy = "generation/test_engine.py::test_greedy_text_is_that_of_transformers"
    assert f"{greedy}[qwen2]" in wrong
    assert set(wrong) - set(kinds.stale([item(drains)])) == {f"{drains}[*]"}
