"""Third-party file formats: Hugging Face bases and tokenizers, PEFT adapters, ONNX."""
