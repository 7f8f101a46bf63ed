"""Audio files, mixtures, drones, and datasets of (mix, target) clips."""

from diffbuf_lib.data.audio import (
    AudioInfo,
    atomic_file,
    check_rate,
    list_audio,
    read_audio,
    read_info,
    resample,
    write_audio,
    write_bytes,
)
from diffbuf_lib.data.build import build_dnlm, download_librispeech
from diffbuf_lib.data.datasets import (
    LAYOUTS,
    ClipDataset,
    Crop,
    DNLMDataset,
    MixingDataset,
    PairedFolderDataset,
    collate,
    draw_crop,
    find_layout,
    open_dataset,
)
from diffbuf_lib.data.demo_set import build_demo
from diffbuf_lib.data.drone import DroneParameters, synthesise
from diffbuf_lib.data.mixing import Mixture, mix_pair

__all__ = [
    "LAYOUTS",
    "AudioInfo",
    "ClipDataset",
    "Crop",
    "DNLMDataset",
    "DroneParameters",
    "MixingDataset",
    "Mixture",
    "PairedFolderDataset",
    "atomic_file",
    "build_demo",
    "build_dnlm",
    "check_rate",
    "collate",
    "download_librispeech",
    "draw_crop",
    "find_layout",
    "list_audio",
    "mix_pair",
    "open_dataset",
    "read_audio",
    "read_info",
    "resample",
    "synthesise",
    "write_audio",
    "write_bytes",
]
