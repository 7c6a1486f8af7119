"""Distills a teacher into a student, and evaluates models: `proteus train`, `evaluate`, `plan` and
`doctor` in one, from the repository.

    python main.py --config=configs/vitb14.py --workdir=runs/vitb14 [--config.FIELD=VALUE ...]

python main.py --help says what else there is.
"""

from proteus_jax.cli.app import main
from proteus_jax.cli.ending import end

if __name__ == "__main__":
    end(main())
