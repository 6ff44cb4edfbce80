"""`python -m janusvln.train`."""

from janusvln.train.command import leave, main

if __name__ == "__main__":
    leave(main())
