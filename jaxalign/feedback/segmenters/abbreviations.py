"""Abbreviations of English, by what may follow them."""

__all__ = ["BEFORE_NAME", "BEFORE_NUMBER", "EITHER", "INNER", "OPENERS"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


BEFORE_NAME = _words(
    """
    dr mr mrs ms mx prof st sr sra fr rev hon gen col maj capt cpt cmdr lt sgt cpl pvt
    sen rep gov pres amb supt messrs mmes mt ft dept univ assoc asst
    """
)
"""A name follows: never the end of a sentence."""

INNER = _words(
    """
    e.g i.e eg ie vs v cf viz ca approx incl excl esp resp al.g a.k.a c.f w.r.t n.b
    """
)
"""The sentence goes on after them, whatever follows."""

BEFORE_NUMBER = _words(
    """
    no nos nr fig figs eq eqs eqn sec secs sect ch chap vol vols p pp par para art
    arts tab ref refs thm lem def prop cor ex exx ver ed eds app cl col ll bk pt b c d
    """
)
"""A number follows; before anything else they may end a sentence."""

EITHER = _words(
    """
    inc ltd co corp llc plc bros jr sr esq ph.d m.d b.a m.a b.sc m.sc ll.b m.b.a d.phil
    a.m p.m a.d b.c b.c.e c.e al etc jan feb mar apr jun jul aug sep sept oct nov dec
    mon tue tues wed thu thur thurs fri sat sun ave blvd rd st sq ste apt bldg hwy
    min max avg hr hrs sec secs lb lbs oz gal in ft yd mi tbsp tsp
    """
)
"""They end a sentence only before a word that opens one (or at the end of a line)."""

OPENERS = _words(
    """
    A An The This That These Those There Here He She It We You They I My Your His Her
    Its Our Their And But Or So Yet Nor If When While Although Though Because Since
    Before After As At By For From In On To With Without Under Over Until Unless
    However Therefore Thus Hence Moreover Furthermore Meanwhile Instead Then Now Next
    First Second Third Finally Also Still Even Only Just What Who Why How Where Which
    Is Are Was Were Do Does Did Can Could Would Should Might Let Please Not No
    Yes Some Many Most All Any Each Every Both Few Several One Two Nobody Nothing
    Everyone Someone Others Another Once Later Today Such Perhaps Maybe Nevertheless
    """
)
"""Words that are capital because a sentence begins, not because they are names."""
