import urllib.error

import pytest
import torchaudio.datasets

from diffbuf_lib.data import download_librispeech
from diffbuf_lib.errors import DataError


def test_a_subset_arrives_whole_and_is_kept(tmp_path, monkeypatch):
    calls = []

    def fetch(root, url, download):
        calls.append(url)
        assert download
        assert not (root / "LibriSpeech").exists()  # what a stopped run unpacked is gone
        (root / "LibriSpeech" / url / "19").mkdir(parents=True)

    (tmp_path / ".librispeech-dev-clean" / "LibriSpeech" / "dev-clean").mkdir(parents=True)
    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", fetch)
    for _ in range(2):
        folder = download_librispeech(tmp_path, "dev-clean")
        assert folder == tmp_path / "LibriSpeech" / "dev-clean"
        assert [path.name for path in folder.iterdir()] == ["19"]
    assert calls == ["dev-clean"]
    assert [path.name for path in tmp_path.iterdir()] == ["LibriSpeech"]


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("Name or service not known"),
        RuntimeError("hash mismatch"),
        EOFError("Compressed file ended"),
    ],
)
def test_no_network_is_one_line_with_a_way_out(tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", fail)
    with pytest.raises(DataError, match="check the network") as error:
        download_librispeech(tmp_path)
    assert "\n" not in str(error.value)
    assert "diffbuf data demo" in str(error.value)
    assert not (tmp_path / "LibriSpeech").exists()


def test_an_unknown_subset_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"'train-clean'.*train-clean-100"):
        download_librispeech(tmp_path, "train-clean")
