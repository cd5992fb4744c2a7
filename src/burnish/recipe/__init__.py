"""The recipe: everything a run depends on, refused before anything is allocated.

schema.py    the frozen tree
written.py   YAML 1.2 and `key.path=value` to plain data, with the place of every key
explain.py   schema errors as a person wants to read them
checks.py    parts that do not fit together
load.py      the four in order
"""

from burnish.recipe.load import load_recipe
from burnish.recipe.schema import Checkpoint, Recipe

__all__ = ["Checkpoint", "Recipe", "load_recipe"]
