"""Run as one of several processes: says which one."""

import os

print(f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}")
