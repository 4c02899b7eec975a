"""The file names that krona and other programs agree on: the one home of each. Torch-free."""

from __future__ import annotations

SAFETENSORS = ".safetensors"
NATIVE_WEIGHTS = "krona_adapter.safetensors"  # of an adapter on the Hub, whatever the file was called on a disk
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

# Endings of pickles, which may run programs when they are opened. The lists differ on purpose.
ADAPTER_PICKLES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")  # in the folder of an adapter
REPO_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # in a repository of the Hub
OTHER_WEIGHTS = (  # the same weights in other forms, beside the safetensors of a component
    ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf",
)  # fmt: skip
