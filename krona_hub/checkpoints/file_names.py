"""Standard file names of krona and other applications, each defined only here. Torch-free."""

from __future__ import annotations

SAFETENSORS = ".safetensors"
NATIVE_WEIGHTS = "krona_adapter.safetensors"  # name of an adapter on the Hub, whatever its local name
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

# File extensions of pickles, which can execute code when loaded. The lists differ deliberately.
ADAPTER_PICKLES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")  # in the folder of an adapter
REPO_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # in a repository of the Hub
OTHER_WEIGHTS = (  # the same weights in other formats, next to the safetensors of a component
    ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf",
)  # fmt: skip
