"""What is used of Ray's own parts, which it may change without a word."""

import os
from types import SimpleNamespace

import pytest
import ray
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.v2._internal.constants import ENABLE_PRINT_PATCH_ENV_VAR, get_env_vars_to_propagate

from ray_sd.cluster import ADDRESS, CHDIR, PRINT_PATCH, training_environment


@pytest.mark.parametrize("address", [None, "192.0.2.7:1"])
def test_what_ray_train_starts_is_told_what_it_needs_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, address: str | None
):
    if address is None:
        monkeypatch.delenv(ADDRESS, raising=False)
    else:
        monkeypatch.setenv(ADDRESS, address)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="192.0.2.1:6379"))
    before = dict(os.environ)
    with training_environment():
        told = get_env_vars_to_propagate()
        assert {name: told[name] for name in (CHDIR, PRINT_PATCH, ADDRESS)} == {
            RAY_CHDIR_TO_TRIAL_DIR: "0",
            ENABLE_PRINT_PATCH_ENV_VAR: "0",
            "RAY_ADDRESS": "192.0.2.1:6379",
        }
    assert dict(os.environ) == before


def test_a_user_may_have_what_workers_print_logged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PRINT_PATCH, "1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="192.0.2.1:6379"))
    with training_environment():
        assert get_env_vars_to_propagate()[PRINT_PATCH] == "1"
