"""Files of others, one format a module: Hugging Face bases, PEFT adapters, heads."""
