"""The real app over ranks with a faked model: `python -m tests.faults.server BEHAVIOUR`."""

import sys

import app
from tests.conftest import fake_engine

if __name__ == "__main__":
    sys.exit(app.main(fake_engine(sys.argv[1])))
