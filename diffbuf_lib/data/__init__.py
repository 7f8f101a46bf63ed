"""Audio files, mixtures, drones, and datasets of (mix, target) clips."""

from diffbuf_lib.data.build import build_dnlm
from diffbuf_lib.data.clips import ClipDataset, Crop, collate, draw_crop
from diffbuf_lib.data.demo import build_demo
from diffbuf_lib.data.dnlm import (
    LAYOUTS,
    DNLMDataset,
    MixingDataset,
    PairedFolderDataset,
    find_layout,
    open_dataset,
)
from diffbuf_lib.data.drone import DroneParameters, synthesise
from diffbuf_lib.data.files import (
    AudioInfo,
    check_rate,
    list_audio,
    read_audio,
    read_info,
    resample,
    write_audio,
    write_bytes,
)
from diffbuf_lib.data.librispeech import download_librispeech
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
