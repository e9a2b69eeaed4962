"""Script without fedtune: reads name -> (format, folder, texts), and prints name -> (tokens, logits)."""

import json
import sys
import warnings
from typing import Any

sys.modules["fedtune"] = None  # type: ignore[assignment]


def load_peft(folder: str, tokens: Any) -> Any:
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder).eval()(**tokens).logits


def load_merged(folder: str, tokens: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    tags = AutoConfig.from_pretrained(folder).architectures[0].endswith("ForTokenClassification")
    auto = AutoModelForTokenClassification if tags else AutoModelForCausalLM
    return auto.from_pretrained(folder)(**tokens).logits


def load_sentence_transformers(folder: str, tokens: Any, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True, show_progress_bar=False)


def load_onnx(folder: str, tokens: Any) -> Any:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in tokens.items()})[0])


def main() -> None:
    import torch
    from transformers import AutoTokenizer

    results = {}
    for name, request in json.load(sys.stdin).items():
        tokenizer = AutoTokenizer.from_pretrained(request["folder"])
        tokens = tokenizer(request["texts"], padding=True, return_tensors="pt", return_token_type_ids=False)
        tokens = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        arguments = [request["texts"]] if request["format"] == "sentence-transformers" else []
        with torch.no_grad():
            logits = globals()["load_" + request["format"].replace("-", "_")](request["folder"], tokens, *arguments)
        results[name] = {key: value.tolist() for key, value in (*tokens.items(), ("logits", logits))}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
