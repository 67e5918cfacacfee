"""Where the stores of an engine's ranks listen."""

import socket
from datetime import timedelta

import psutil
import pytest
from torch.distributed import DistNetworkError

from async_rl.weights.vllm import listening


def test_a_store_listens_at_its_own_address_and_says_as_torch_does_that_a_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DistNetworkError, match="EADDRINUSE"):
            listening._store(host_name="127.0.0.1", port=port, is_master=True)
    store = listening._store(
        host_name="127.0.0.1", port=port, is_master=True, world_size=1, timeout=timedelta(seconds=10)
    )
    found = {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.laddr.port == port}
    assert found == {"127.0.0.1"}
    del store
