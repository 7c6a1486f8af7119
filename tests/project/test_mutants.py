"""The list of mutants is true, and its runner tells one that is found from one that is not."""

from pathlib import Path

import mutants
from conftest import ROOT
from mutant_list import MUTANTS, Mutant


def test_every_entry_can_be_put_in() -> None:
    assert [reason for each in MUTANTS if (reason := mutants.broken(each))] == []
    places = [(each.file, each.text, each.replacement) for each in MUTANTS]
    assert len(set(places)) == len(places) >= 150
    for each in MUTANTS:
        changed = (ROOT / each.file).read_text().replace(each.text, each.replacement)
        compile(changed, each.file, "exec")


def test_an_entry_whose_text_or_test_is_gone_is_broken() -> None:
    good = MUTANTS[0]
    assert mutants.broken(good._replace(text="no such text")).startswith("its text is 0 times")
    assert mutants.broken(good._replace(file="none.py")).startswith("its text is 0 times")
    assert mutants.broken(good._replace(tests=("test_mutants.py::test_x",))).startswith("there is")
    assert mutants.broken(good._replace(tests=("test_none.py",))).startswith("there is no")


def test_a_fault_is_found_where_a_test_fails(tmp_path: Path) -> None:
    """And the file is as it was afterwards."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "code_under_test.py").write_text("VALUE = 1 + 1\n")
    (tmp_path / "tests" / "test_code.py").write_text(
        "import sys\nsys.path.insert(0, '.')\n\n\n"
        "def test_it():\n    import code_under_test\n    assert code_under_test.VALUE == 2\n"
    )
    for replacement, code in (("1 + 2", mutants.FAILED), ("2", 0)):
        one = Mutant("code_under_test.py", "1 + 1", replacement, "", ("test_code.py::test_it",))
        found, printed = mutants.seen(one, tmp_path, tmp_path / "programs")
        assert found == code, printed
        assert (tmp_path / "code_under_test.py").read_text() == "VALUE = 1 + 1\n"
