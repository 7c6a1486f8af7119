"""How XLA compiles where tests run: most of their time would be its own otherwise.

Without optimizations, and with the emitters of loops that XLA had before its present ones, a
training step is compiled in a third of the time or less. Rounding differs a little.
"""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"
# Later ones have only the present emitters.
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) <= (0, 10):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
