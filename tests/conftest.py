"""One thread (sums differ in the last bit between thread counts) and the same global seed for every test."""

from __future__ import annotations

import uuid

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run: a suite that fails must fail again.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def bucket(monkeypatch):
    """The address of a bucket on an S3-compatible server, which other processes find as well."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address, "AWS_ENDPOINT_URL_S3": address,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import fsspec

    name = f"clips-{uuid.uuid4().hex}"  # the server's memory is this process's, so a name may be taken
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    yield f"s3://{name}"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()
