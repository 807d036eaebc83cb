"""Open checkpoints where no software that writes them can be imported; print digests as JSON.

Run as a program, with paths; each stored tensor, and each layer of a stack of layers, gets its
shape, its dtype and the SHA-256 of its elements as float32. What has a row per word of a vocabulary
gets that of each row as well: how many rows pad it depends on the parallel layout.
"""

import hashlib
import json
import sys

VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
BLOCKED = ("nemo", "bionemo", "megatron", "zarr", "tensorstore", "deepspeed", "lightning")


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked here")


def digest(tensor):
    data = tensor.float().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def described(tensor):
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256_f32": digest(tensor)}


def digests(path):
    import bioinit

    with bioinit.open_checkpoint(path) as checkpoint:
        found = {}
        for name, tensor in checkpoint.tensors.items():
            if ".layers.self_attention." in name or ".layers.mlp." in name:
                inner = tensor.shape[1:]
                for layer in range(tensor.shape[0]):
                    region = ((layer, *(0 for _ in inner)), (1, *inner))
                    spelled = name.replace(".layers.", f".layers.{layer}.")
                    found[spelled] = described(checkpoint.read(name, region)[0])
            else:
                whole = checkpoint.read(name)
                found[name] = described(whole)
                if name.endswith(VOCABULARY):
                    found[name]["rows"] = [digest(row) for row in whole]
        answer = {"format": checkpoint.format, "tensors": found}
        if checkpoint.context is not None:
            answer["config"] = bioinit.load_context(path, "model.config")
            answer["model"] = checkpoint.context.model
            answer["data"] = checkpoint.context.data
        return answer


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    found = {path: digests(path) for path in sys.argv[1:]}
    found["imported"] = sorted(n for n in sys.modules if n.partition(".")[0] in BLOCKED)
    json.dump(found, sys.stdout, default=str)
