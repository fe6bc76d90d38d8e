"""What train.py is built from. Importing the package imports none of its modules."""

import sys

if sys.platform == "win32":  # else that would be a traceback in the first module that Windows lacks
    sys.exit("error: Linux is needed (without a GPU also macOS); on Windows use WSL2, docs/install.md says how")
if sys.version_info < (3, 10):  # else that would be a traceback in the first module
    sys.exit("error: Python 3.10 or newer is needed, and this is %d.%d; start with bash run.sh, which finds one or "
             "makes an environment" % sys.version_info[:2])
