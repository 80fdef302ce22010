"""Random blocks (tests/fuzz): none may become another.  2,000 of them: python tests/fuzz/run.py"""

from __future__ import annotations

import pytest
from fuzz.draw import CHEAP, drawn
from fuzz.judge import judge, kind_of
from fuzz.mistakes import mistakes
from fuzz.run import judged
from fuzz.shrink import shrunk
from fuzz.source import Pair
from fuzz.spec import Spec
from reliability import write_section

# What was wrong once, or crashed.
FOUND = {
    "a saturated router hides what few rows change": Spec(
        mistake="if_just_some_rows", body="glu_split", edit="other_mode", experts=2, top_k=1, inner=12, first=2
    ),
    "a global number counts calls": Spec(mistake="if_called_globally"),
    "a global list counts calls": Spec(mistake="if_listed_globally", head="hit_list"),
    "a setting in a dict of the file": Spec(mistake="w_of_config", head="hit_list", edit="settings"),
    "a setting in an object of the file": Spec(mistake="w_of_object", head="hit_list", edit="settings"),
    "settings in a list of the file": Spec(mistake="w_of_limits", head="hit_list", edit="settings"),
    "a setting in a closure": Spec(mistake="w_of_closure", head="hit_list", edit="settings"),
    "a setting in a list of the class": Spec(mistake="w_of_class_list", head="hit_list", edit="settings"),
}


# What was left as it was once.
LEFT = {
    "sorted choices, token after token": Spec(spelling="tokens", router="sorted", storage="stack_io", first=1),
    "sorted choices, slot after slot": Spec(router="argsorted", storage="params", head="slots", first=2, tokens=(6, 6)),
    "one weight divided by itself": Spec(spelling="tokens", router="renormalised", top_k=1),
    "start == end": Spec(spelling="sort_numpy", skip="any"),
    "experts by names": Spec(spelling="tokens", storage="dict"),
    "the busiest first": Spec(head="busiest_first"),
}


def test_random_blocks_mean_themselves():
    found = list(judged(drawn(48, sizes=CHEAP), jobs=2))
    bad = [v for v in found if v.bad]
    assert not bad, str(shrunk(bad[0]))
    assert sum(v.status == "rewritten" for v in found) >= 18


@pytest.mark.parametrize("name", FOUND)
def test_found_once(name):
    verdict = judge(FOUND[name])
    assert not verdict.bad, str(verdict)


@pytest.mark.parametrize("name", LEFT)
def test_left_once(name):
    verdict = judge(LEFT[name])
    assert verdict.status == "rewritten", str(verdict)


def test_wrong_program_would_be_told(monkeypatch):
    """The comparison itself: a block that is compared with another one is wrong, and shrinks to what differs."""
    before = Pair.__init__

    def other(self: Pair, s: Spec) -> None:
        before(self, s)
        if s.mistake == "w_twice":
            self.subject.gate.weight.data.mul_(2)

    monkeypatch.setattr(Pair, "__init__", other)
    verdict = judge(Spec(mistake="w_twice", storage="stack_oi", experts=2))
    assert verdict.status == "WRONG"
    assert "w = w * w" in str(verdict)
    assert shrunk(verdict).spec == Spec(mistake="w_twice")
    assert judge(Spec(experts=2)).status == "rewritten"


def test_drawn_blocks_are_always_the_same():
    assert drawn(20, 3) == drawn(20, 3) != drawn(20, 4)


def test_every_mistake_changes_the_source():
    from fuzz.source import source

    plain = Spec(head="hit_list", storage="stack_oi")
    assert len({source(Spec(head="hit_list", storage="stack_oi", mistake=m)) for m in mistakes(plain)}) == len(mistakes(plain))


def test_reasons_are_counted_without_names():
    assert kind_of("Block stays as it is: /a/b.py:12: Python decides by x_1 > 3") == "Python decides by # > #"


def test_section_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- fuzz -->\nold\n<!-- end of fuzz -->\nb\n<!-- mutations -->\nkept\n<!-- end of mutations -->\n")
    write_section(page, "fuzz", "new")
    assert page.read_text() == "a\n<!-- fuzz -->\nnew\n<!-- end of fuzz -->\nb\n<!-- mutations -->\nkept\n<!-- end of mutations -->\n"
    with pytest.raises(ValueError, match="no section 'other'"):
        write_section(page, "other", "")
