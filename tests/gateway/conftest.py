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
