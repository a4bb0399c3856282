"""The picker's gRPC server: who may talk to it, and how it ends."""

import signal
import socket
import sys

import pytest
from envoy_process import Process, answers, free_port, until

pytest.importorskip("envoy.service.ext_proc.v3", reason="pip install 'marginroute[envoy]'")
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from marginroute.__main__ import main


@pytest.fixture
def settings(bundle_folder, tmp_path):
    path = tmp_path / "picker.yaml"
    log = tmp_path / "log.jsonl"
    path.write_text(f"bundle: {bundle_folder}\nlog: {log}\nendpoints: {{small/0: '10.0.0.1:80'}}\n")
    return ["envoy", "--config", str(path)]


def test_clients_without_a_certificate_are_not_let_in(settings, tmp_path, certificate):
    key, cert = map(str, certificate)
    port = free_port()
    words = ["--port", str(port), "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert]
    picker = Process([sys.executable, "-m", "marginroute", *settings, *words], tmp_path / "output.txt")
    try:
        until(lambda: answers(port) or not picker.alive(), what="the picker")
        secret, pem = (path.read_bytes() for path in certificate)
        known, unknown = grpc.ssl_channel_credentials(pem, secret, pem), grpc.ssl_channel_credentials(pem)
        where, ask = f"localhost:{port}", health_pb2.HealthCheckRequest(service="readiness")
        for channel, let_in in (
            (grpc.secure_channel(where, known), True),
            (grpc.secure_channel(where, unknown), False),
            (grpc.insecure_channel(where), False),
        ):
            with channel:
                stub = health_pb2_grpc.HealthStub(channel)
                if let_in:
                    assert stub.Check(ask, timeout=10.0).status == health_pb2.HealthCheckResponse.SERVING
                else:
                    with pytest.raises(grpc.RpcError):
                        stub.Check(ask, timeout=3.0)
    finally:
        assert picker.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--tls-cert", "nowhere.pem"], "needs both"),
        (["--print-envoy", "headers", "--config", "NONE"], "endpoints is empty"),
        (["--print-envoy", "headers", "--envoy-port", "99999"], "--envoy-port 99999 is not legal"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read (No such file or directory)"),
    ],
)
def test_what_is_not_safe_or_not_possible_is_refused(settings, bundle_folder, tmp_path, capsys, words, said):
    none = tmp_path / "none.yaml"
    none.write_text(f"bundle: {bundle_folder}\nlog: {tmp_path / 'log.jsonl'}\n")
    assert main([*settings, *(str(none) if word == "NONE" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1


def test_an_address_in_use_is_refused(settings, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*settings, "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["observe", "headers", "buffered", "full-duplex"])
def test_the_printed_configuration_names_picker_and_engines(settings, capsys, way):
    yaml = pytest.importorskip("yaml")
    assert main([*settings, "--uds", "p.sock", "--print-envoy", way, "--envoy-port", "12345"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)["static_resources"]
    assert made["listeners"][0]["address"]["socket_address"]["port_value"] == 12345
    addresses = [
        c["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"] for c in made["clusters"]
    ]
    assert addresses[0] == {"socket_address": {"address": "10.0.0.1", "port_value": 80}}
    assert addresses[1]["pipe"]["path"].endswith("/p.sock")
