"""Write the shipped vectors anew."""

import sys

from nsq_ref.conformance.vectors import FOLDER, write

write(FOLDER, lambda file: print(file, file=sys.stderr))
