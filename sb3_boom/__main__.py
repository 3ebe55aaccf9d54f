"""``python -m sb3_boom`` is ``sb3-boom``."""

from sb3_boom.cli import main

main()
