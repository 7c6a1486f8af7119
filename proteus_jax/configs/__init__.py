"""The configurations. A wheel has them here; in the repository they lie in its folder configs/."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
