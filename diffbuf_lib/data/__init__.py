"""Audio files, mixtures, and datasets of (mix, target) clips."""

from diffbuf_lib.data.audio import read_audio, read_info, write_audio
from diffbuf_lib.data.build import build_dnlm, download_librispeech
from diffbuf_lib.data.datasets import (
    LAYOUTS,
    ClipDataset,
    DNLMDataset,
    MixingDataset,
    PairedFolderDataset,
    collate,
    find_layout,
    open_dataset,
    open_datasets,
)
from diffbuf_lib.data.mixing import mix_pair
from diffbuf_lib.data.pack import pack_folder

__all__ = [
    "LAYOUTS", "ClipDataset", "DNLMDataset", "MixingDataset", "PairedFolderDataset",
    "build_dnlm", "collate", "download_librispeech", "find_layout", "mix_pair", "open_dataset",
    "open_datasets", "pack_folder", "read_audio", "read_info", "write_audio",
]  # fmt: skip
