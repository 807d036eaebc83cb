"""Open checkpoints where no software that writes them can be imported; print digests as JSON.

Run as a program, with paths; each stored tensor, and each layer of a stack of layers, gets the
SHA-256 of its elements as float32.
"""

import hashlib
import json
import sys

BLOCKED = ("nemo", "bionemo", "megatron", "zarr", "tensorstore", "deepspeed", "lightning")


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked here")


def digest(tensor):
    data = tensor.float().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def digests(path):
    import bioinit

    with bioinit.open_checkpoint(path) as checkpoint:
        found = {}
        for name, tensor in checkpoint.tensors.items():
            if tensor.kind != "weight" or not tensor.dtype.is_floating_point:
                continue
            if ".layers.self_attention." in name or ".layers.mlp." in name:
                inner = tensor.shape[1:]
                for layer in range(tensor.shape[0]):
                    region = ((layer, *(0 for _ in inner)), (1, *inner))
                    spelled = name.replace(".layers.", f".layers.{layer}.")
                    found[spelled] = digest(checkpoint.read(name, region)[0])
            else:
                found[name] = digest(checkpoint.read(name))
        context = checkpoint.context
        return {
            "format": checkpoint.format,
            "tensors": found,
            "context": None if context is None else {"model": context.model, "data": context.data},
        }


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    found = {path: digests(path) for path in sys.argv[1:]}
    found["imported"] = sorted(n for n in sys.modules if n.partition(".")[0] in BLOCKED)
    json.dump(found, sys.stdout, default=str)
