"""What torch.compile needs of a machine."""

import os
import shutil
import sys

from ray_sd.errors import ConfigError


def check_cpu_compiler(setting: str) -> None:
    """Raise ConfigError where torch.compile, asked for by a setting, finds no compiler for CPUs. It looks for the same one."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"{setting}: on CPUs torch compiles by {compiler}, which this machine does not have; install it "
            f"(apt install g++), name another by the variable CXX, or take {setting}=false"
        )
