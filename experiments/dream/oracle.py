"""A judge that has read the answers: what ``dream_observations`` says is right is 1.0.

    JAXALIGN_DREAM=data jaxalign eval --tasks dream_observations --data_dir data \
        --out oracle --judge.name python --judge.path experiments/dream/oracle.py

The variable names the ``--data_dir``; ``JAXALIGN_DREAM_IMAGES`` the ``--image_dir``
where there is one. It says in each pass what the published file observes there, and to
the verifier yes. That all figures are then 1 is a test of the task, not of a judge.
"""

import os
from pathlib import Path

from jaxalign.data.images import reference
from jaxalign.evaluation.tasks import dream_observations


def _known():
    """Return what is observed, by the words and the picture beside them."""
    images = os.environ.get("JAXALIGN_DREAM_IMAGES")
    items = dream_observations.load(
        Path(os.environ["JAXALIGN_DREAM"]),
        image_dir=None if images is None else Path(images),
    )
    found = {}
    for one in items.rows:
        shown = () if one.picture is None else (reference(one.picture.read()),)
        # Alone, words or picture may be those of several exchanges: only together do
        # they say which observations are wanted.
        found[one.text, shown] = [o._asdict() for o in one.visible]
    return found


KNOWN = _known()


def judge(requests):
    """Return a reply to each request of disentangling."""
    return [_reply(request) for request in requests]


def _reply(request):
    if request["task"] == "verify":
        return {"answer": "yes"}
    shown = tuple(request["images"])
    return {"observations": KNOWN.get((request["prompt"], shown), [])}
