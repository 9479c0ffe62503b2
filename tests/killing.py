"""Ends commands as a machine's failure does."""

import subprocess

import psutil


def kill_with_cluster(driver: subprocess.Popen) -> None:
    """End a driver as `kill -9` does, and whatever of the Ray that it started does not end with it."""
    cluster = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(cluster, timeout=30)
    for process in left:
        process.kill()
