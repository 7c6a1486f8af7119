"""Settings of absl, the library of flags and logs that Grain uses."""

import absl.flags
import absl.logging


def parse_flags() -> None:
    """Lets Grain's workers read its flags, which only programs of absl.app have parsed."""
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()


def silence() -> None:
    """Keeps what Grain and its readers say by absl from the terminal, from here on in this process:
    they speak whenever a file is first read. Their errors are raised all the same.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
