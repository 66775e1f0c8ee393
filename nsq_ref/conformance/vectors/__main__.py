"""Write the shipped vectors anew."""

import sys

from nsq_ref.conformance.vectors import FOLDER, write

if __name__ == "__main__":
    write(FOLDER, lambda file: print(file, file=sys.stderr))
