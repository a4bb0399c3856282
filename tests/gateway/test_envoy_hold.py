"""Requests that wait for room behind a real Envoy: it keeps them longer than it otherwise waits for the picker."""

import concurrent.futures
import dataclasses
import time

import envoy_process as ep
import pytest
from bundles import small_bundle
from upstream import Upstream

pytest.importorskip("envoy.service.ext_proc.v3", reason="pip install 'marginroute[envoy]'")

from marginroute import bundle as bundles
from marginroute.margin_rule import MarginParameters, MarginRule

pytestmark = [pytest.mark.integration, ep.needs_envoy]


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    """A replica takes one request at a time."""
    policy = MarginRule("bid-price", MarginParameters(station_usd_per_s=(0.0, 0.0, 0.0), cap_share=0.125))
    folder = tmp_path_factory.mktemp("bundles") / "small"
    bundles.save(dataclasses.replace(small_bundle(), policy=policy), folder)
    return folder


@pytest.mark.parametrize("way", ["headers", "buffered", "full-duplex"])
def test_a_full_replica_gets_one_after_the_other(bundle_folder, tmp_path, way):
    upstream = Upstream("a")
    endpoints = {"small/0": f"127.0.0.1:{upstream.server.server_address[1]}"}
    picker = ep.Picker(bundle_folder, tmp_path, endpoints, can=["shed", "hold"], max_hold_s=8.0)
    envoy = ep.Envoy(way, picker.uds, tmp_path, endpoints, hold_s=8.0)
    try:
        picker.wait()
        envoy.wait()
        began_s = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            codes = [answer[0] for answer in pool.map(lambda _: ep.chat(envoy.port, "slow"), range(4))]
        took_s = time.monotonic() - began_s
        assert codes == [200] * 4 and upstream.peak == 1
        assert took_s > 4 * 0.5  # far beyond Envoy's message_timeout of 0.2 s
        records = picker.records(4)
        assert {r["served_by"] for r in records} == {"small/0"} and {r["status"] for r in records} == {"completed"}
        with pytest.raises(TimeoutError), concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(ep.chat, envoy.port, "slow")
            time.sleep(0.1)
            ep.chat(envoy.port, "slow", timeout=0.2)  # hangs up while it waits
        assert first.result()[0] == 200 and upstream.peak == 1
        assert sorted(r["status"] for r in picker.records(2)) == ["abandoned", "completed"]
    finally:
        envoy.stop()
        picker.stop()
        upstream.close()
