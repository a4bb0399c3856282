import shutil
import subprocess

import pytest
from bundles import small_bundle

from marginroute import bundle as bundles


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "small"
    bundles.save(small_bundle(), folder)
    return folder


@pytest.fixture
def bundle(bundle_folder):
    return bundles.load(bundle_folder)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Files of a key and of a certificate for localhost that is its own CA."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "key.pem", folder / "cert.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    made = ("-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", files[0], "-out", files[1])
    subprocess.run([openssl, "req", *name, *made], check=True, capture_output=True)
    return files
