import pytest
from serving import comfyui


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with comfyui(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
