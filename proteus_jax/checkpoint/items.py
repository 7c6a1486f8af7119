"""The items that a checkpoint holds, each a pytree of its own but for the facts, which are JSON.

Parameters are apart: who only wants the model need not know the optimizer.
"""

PARAMS, PROGRESS, STATISTICS, FACTS = "params", "progress", "statistics", "facts"
# Which facts a checkpoint has, and by which names.
FORMAT, VERSION = "format", 2
