"""One class for faults of the input, and how a command ends."""

import sys


class InputError(ValueError):
    """A fault of what the user gave, in one sentence that names the file or the flag and says what was expected."""


def run_command(main):
    """Run a command's main(). A fault of the input becomes its sentence; a fault of our own code keeps its traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def sentence(error):
    """The text of an InputError. One from a worker of a DataLoader comes wrapped in the worker's own traceback."""
    text = str(error)
    return text.rpartition("InputError: ")[2].strip() if text.startswith("Caught InputError") else text
