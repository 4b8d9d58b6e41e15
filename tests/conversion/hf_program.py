"""A user's program, run by tests/conversion/test_hf_memory.py: transformers and an exported folder,
without any package of ours."""

import importlib.util
import json
import sys
from pathlib import Path

OURS = ("megatron_memory", "memory_kernels", "megatron")


class NoPackageOfOurs:
    """As if they were not installed."""

    def find_spec(self, name, path=None, target=None):
        """Nothing is found under their names."""
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(name)


def main(request: str) -> None:
    """Read folders and tokens from a JSON text; print what the models make of them as JSON."""
    sys.meta_path.insert(0, NoPackageOfOurs())
    for name in OURS:
        try:
            importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported")

    import torch

    torch.set_num_threads(1)
    asked = json.loads(request)
    tokens = torch.tensor(asked["tokens"])
    print(json.dumps({folder: use(folder, tokens, asked) for folder in asked["folders"]}))


def use(folder: str, tokens, asked: dict) -> dict:
    """What the model in a folder makes of the tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, Path(folder) / "logits.pt")
    options = {"max_new_tokens": asked["new_tokens"], "do_sample": False, "pad_token_id": 0}
    prompt = tokens[:, : asked["prompt_tokens"]]
    answer = {
        "cached": model.generate(prompt, **options).tolist(),
        "uncached": model.generate(prompt, use_cache=False, **options).tolist(),
        "dtype": str(model.dtype),
    }
    if (Path(folder) / "tokenizer.json").exists():
        answer["text"] = continue_text(folder, asked["text"], asked["new_tokens"])
    return answer


def continue_text(folder: str, text: str, num_tokens: int) -> str:
    """By transformers' pipeline."""
    from transformers import pipeline

    generator = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
    generated = generator(text, max_new_tokens=num_tokens, do_sample=False)
    return generated[0]["generated_text"]


if __name__ == "__main__":
    main(sys.argv[1])
