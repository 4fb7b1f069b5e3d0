"""Power loss: a store or broker on a disk of its own, whose power is cut while it works.

    python -m tests.power [--images N] [--setting NAME] [--json FILE]

Each image is one cut: `cut.py` makes a disk (`disk.py`), lets one of the settings of `settings.py` write
on it and say what was promised, cuts the power, starts it again, and counts what is missing.

Settings that are known to lose are run too, as controls: a run in which they lose nothing has not
cut the power, and says nothing about the others.
"""
